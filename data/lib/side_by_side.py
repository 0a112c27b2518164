"""em.py --compare: a model for each method of data/methods.py and each seed, trained on
the same raw documents for the same number of tokens."""

from pathlib import Path

from data.lib.cli import read_json


def run_methods(s, data: Path, out_dir: Path, stages) -> list[dict]:
    """Make the methods' corpora, train and evaluate their models.

    Returns a row for each method. s: em.py's settings.
    """
    folder = out_dir / "methods"
    flags = {"corpus": data, "out_dir": folder, "tokens": s.tokens, "seed": s.seed}
    stages.run("methods", "data/methods.py", folder, "meta.json", flags)
    rows = []
    for method in read_json(folder / "meta.json")["methods"]:
        evaluation = method["evaluation"]
        if method["thoughts"]:
            evaluation = evaluation | {"max_new": s.max_new}
        models = []
        for seed in range(s.seed, s.seed + s.seeds):
            models.append(out_dir / f"{method['name']}-seed{seed}")
            run_method(s, method, evaluation, seed, models[-1], stages)
        rows.append(method_row(method, evaluation, models))
    return rows


def run_method(
    s, method: dict, evaluation: dict, seed: int, model: Path, stages
) -> None:
    """Train a model by a method and evaluate it."""
    folder = model.parent / "methods"
    common = {"seed": seed, "device": s.device}
    thoughts = folder / method["thoughts"] if method["thoughts"] else ""
    flags = {
        "corpus": folder / method["corpus"],
        "thoughts": thoughts,
        "out_dir": model,
    }
    flags |= {"max_tokens": s.tokens} | common
    stages.run(model.name, "train.py", model, "config.json", flags, s.train)
    flags = {
        "corpus": folder / method["heldout"],
        "model": model,
        "out_dir": model / "eval",
    }
    flags |= evaluation | common
    stages.run(
        f"{model.name} eval",
        "eval_math.py",
        model / "eval",
        "results.json",
        flags,
        s.eval,
    )


def method_row(method: dict, evaluation: dict, models: list[Path]) -> dict:
    """A method's figures, gathered from the folders of its models."""
    results = [read_json(model / "eval/results.json") for model in models]
    training = [read_json(model / "training.json") for model in models]
    accuracies = [r["accuracy"] for r in results]
    return {
        "name": method["name"],
        "heldout": method["heldout"],
        "evaluation": evaluation,
        "accuracies": accuracies,
        "accuracy": sum(accuracies) / len(models),
        "cut_off": sum(r["cut_off"] for r in results) / sum(r["n"] for r in results),
        "nll": [
            r["nll_bound"]["16"] if method["thoughts"] else r["nll"] for r in results
        ],
        "documents": method["documents"],
        "passes": training[0]["data"][0]["epochs"],
        "train_tokens": [t["train_tokens"] for t in training],
    }
