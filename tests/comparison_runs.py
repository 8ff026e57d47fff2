"""Run folders as training and test scripts leave them, with made-up results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from datasets import DATASETS
from utils.checkpoint import save_checkpoint
from utils.evaluation import CaseResult
from utils.metrics import FOUND, ClassResult, Metrics
from utils.results import case_table, write_csv

NAN = float("nan")


def class_result(dice: float, hd95: float = 2.0, strict: float | None = None) -> ClassResult:
    """A class with these scores, under the strict convention too unless told otherwise."""
    metrics = Metrics(dice, hd95, dice / (2 - dice), hd95 / 4)
    return ClassResult(FOUND, metrics, metrics if strict is None else Metrics(strict, NAN, NAN, NAN))


def write_run(
    folder: Path,
    dice: Mapping[str, Sequence[float]],
    *,
    seed: int = 1,
    split: str = "test",
    dataset: str = "acdc",
    class_names: Sequence[str] = ("right ventricle", "myocardium", "left ventricle"),
    unit: str = "mm",
    selected_on: str = "val",
    results: Sequence[CaseResult] | None = None,
    summary: Mapping[str, object] | None = None,
    **args: object,
) -> Path:
    """Write `config.json`, `metrics.csv` and the results of a split; dice: of each class, by case."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"output_dir": str(folder), "list_dir": DATASETS[dataset].list_dir, "max_epochs": 6, **args}
    args |= {"seed": seed, "variant": args.get("variant", "paper")}
    data = {"dataset": dataset, "class_names": list(class_names)}
    (folder / "config.json").write_text(json.dumps({"args": args, "data": data}))
    history = [{"epoch": e, "train_loss": 3 / e, "val_dice": NAN if e % 2 else 1 - 1 / e} for e in range(1, 7)]
    pd.DataFrame(history).to_csv(folder / "metrics.csv", index=False)
    if results is None:
        results = [CaseResult(case, unit, tuple(map(class_result, values))) for case, values in dice.items()]
    if results:
        write_csv(folder / f"results_{split}" / "cases.csv", case_table(results, class_names, selected_on))
    if summary:
        (folder / f"results_{split}" / "summary.json").write_text(json.dumps(summary))
    return folder


def save_network(path: Path, model: torch.nn.Module, dataset: str = "acdc", **facts: object) -> Path:
    """Write a network as the checkpoint of a run on a data set, with further facts of the run."""
    info = DATASETS[dataset]
    data = {"dataset": dataset, "class_names": info.class_names, "preprocessing": info.preprocessing.to_dict()}
    data["selected_on"] = "val"
    save_checkpoint(path, {"model": model.state_dict(), "network": model.config, "data": data, **facts})
    return path


def random_dice(cases: int, seed: int, centre: float = 0.8, num_classes: int = 3) -> dict[str, list[float]]:
    """Scores around a centre, of cases patient000, patient001, ..."""
    scores = np.clip(np.random.default_rng(seed).normal(centre, 0.05, (cases, num_classes)), 0, 1)
    return {f"patient{i:03d}": row for i, row in enumerate(scores.tolist())}
