"""What --preset of train.py changes; flags given beside it win.

The recipe for 1.1B parameters is the paper's (its section 4 and appendix).
"""

BIG = {
    "attention": "packed",
    "optimizer": "adamw",
    "lr": 1e-4,
    "final_lr": 1e-6,
    "weight_decay": 0.01,
    "warmup": 1000,
    "dtype": "bfloat16",
    "save_every": 500,
    "val_every": 500,
}
TINYLLAMA = BIG | {
    "n_layer": 22,
    "n_head": 32,
    "n_kv_head": 4,
    "n_embd": 2048,
    "n_hidden": 5632,
    "n_vocab": 32004,
    "seq_len": 2048,
    "rope_theta": 1e4,
    "tie_embeddings": False,
    "micro_batch": 8,
    "compile": True,
}
SMOLLM2 = BIG | {
    "n_layer": 30,
    "n_head": 9,
    "n_kv_head": 3,
    "n_embd": 576,
    "n_hidden": 1536,
    "n_vocab": 49156,
    "seq_len": 1024,
    "rope_theta": 1e5,
    "batch_size": 8,
    "micro_batch": 2,
    "lr": 3e-4,
    "warmup": 20,
    "save_every": 50,
    "val_every": 50,
}
PRESETS = {
    "toy": {},
    "smollm2-135m": SMOLLM2,
    "tinyllama-1.1b": TINYLLAMA | {"batch_size": 192, "max_steps": 33060},
    "tinyllama-1.1b-warm": TINYLLAMA | {"batch_size": 96, "max_steps": 4069},
}
