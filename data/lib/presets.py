"""What --preset of train.py and of em.py changes; flags given beside it win.

The recipe for 1.1B parameters is the paper's (its section 4 and appendix).
"""

BIG = {
    "attention": "packed",
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "final_lr": 1e-6,
    "dtype": "bfloat16",
}
SMOLLM2 = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536, n_vocab=49156)
SMOLLM2 |= dict(seq_len=1024, rope_theta=1e5, batch_size=8, micro_batch=2)
SMOLLM2 |= dict(lr=3e-4, warmup=20, save_every=50, val_every=50)
TINYLLAMA = dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_hidden=5632, n_vocab=32004)
TINYLLAMA |= dict(seq_len=2048, rope_theta=1e4, tie_embeddings=False, micro_batch=8, compile=True)
TINYLLAMA |= dict(lr=1e-4, warmup=1000, save_every=500, val_every=500)
PRESETS = {
    "toy": {},
    "smollm2-135m": BIG | SMOLLM2,
    "tinyllama-1.1b": BIG | TINYLLAMA | {"batch_size": 192, "max_steps": 33060},
    "tinyllama-1.1b-warm": BIG | TINYLLAMA | {"batch_size": 96, "max_steps": 4069},
}

# SmolLM2-135M thinks in equations. Few laptops have bfloat16, and from M0 an M-step takes fewer
# steps. An equation says the answer, so all thoughts gain: the evidence is asked, and only
# documents whose thought was kept are trained on.
WORDS = "--preset=smollm2-135m --attention=document --seq_len=512 --batch_size=2"
EM_PRESETS = {
    "toy": {},
    "word-problems": {
        "m_steps_from": "M0",
        "max_new": 40,
        "controls": True,
        "only": "raw_tokens,raw_flops,warm_flops,uniform,gold",
        "train": f"{WORDS} --dtype=float32 --max_steps=70 --thoughts_only=true",
        "warm_train": "--max_steps=94",
        "infer": "--gain_by=evidence",
        "eval": "--gain_by=evidence --bound_docs=100",
    },
}
