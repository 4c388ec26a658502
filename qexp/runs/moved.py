"""Former names of classes, for the configurations of older runs.

`model=from_run` builds objects from the configuration that a run recorded. Classes moved into
packages in version 0.2; delete this table after one release.
"""

from typing import Any

MOVED = {
    "qexp.activations.Float": "qexp.quantizers.scheme.FloatActivations",
    "qexp.activations.Quantized": "qexp.quantizers.scheme.QuantizedActivations",
    "qexp.augmentation.Augmented": "qexp.training.augmentation.Augmented",
    "qexp.data.calibration.NoCalibration": "qexp.data.recipe.NoCalibration",
    "qexp.data.known.Known": "qexp.data.standard.StandardCorpus",
    "qexp.eval.against.AgainstFloat": "qexp.eval.against_float.AgainstFloat",
    "qexp.fused.Formula": "qexp.quantizers.fake_quantize.FakeQuantize",
    "qexp.learned.Dynamic": "qexp.quantizers.scale_rules.Dynamic",
    "qexp.learned.FixedCodes": "qexp.quantizers.scale_rules.FixedCodes",
    "qexp.learned.LSQ": "qexp.quantizers.scale_rules.LSQ",
    "qexp.learned.Static": "qexp.quantizers.scale_rules.Static",
    "qexp.ledger.Ledger": "qexp.sweeps.callbacks.Ledger",
    "qexp.levels.LevelGrid": "qexp.grid.LevelGrid",
    "qexp.loggers.Csv": "qexp.report.loggers.Csv",
    "qexp.loggers.Wandb": "qexp.report.loggers.Wandb",
    "qexp.losses.CrossEntropy": "qexp.training.losses.CrossEntropy",
    "qexp.losses.HiddenL2": "qexp.training.losses.HiddenL2",
    "qexp.losses.LogitKL": "qexp.training.losses.LogitKL",
    "qexp.methods.efficient.BlockPhase": "qexp.methods.block_phase.BlockPhase",
    "qexp.methods.efficient.EfficientQAT": "qexp.methods.reconstruction.Reconstruction",
    "qexp.methods.efficient_qat.BlockPhase": "qexp.methods.block_phase.BlockPhase",
    "qexp.methods.efficient_qat.EfficientQAT": "qexp.methods.reconstruction.Reconstruction",
    "qexp.methods.nothing.Nothing": "qexp.step.Nothing",
    "qexp.models.run.Run": "qexp.models.from_run.FromRun",
    "qexp.optimizer.AdamW": "qexp.training.optimizer.AdamW",
    "qexp.own.no_grid": "qexp.config.grid_choice.no_grid",
    "qexp.penalties.Deviation": "qexp.training.penalties.Deviation",
    "qexp.penalties.NoPenalty": "qexp.training.penalties.NoPenalty",
    "qexp.penalties.Outliers": "qexp.training.penalties.Outliers",
    "qexp.penalties.Span": "qexp.training.penalties.Span",
    "qexp.placement.AllOps": "qexp.quantizers.placement.AllOps",
    "qexp.placement.KVCache": "qexp.quantizers.placement.KVCache",
    "qexp.placement.LinearInputs": "qexp.quantizers.placement.LinearInputs",
    "qexp.ranges.Entropy": "qexp.grid.ranges.Entropy",
    "qexp.ranges.MSE": "qexp.grid.ranges.MSE",
    "qexp.ranges.MinMax": "qexp.grid.ranges.MinMax",
    "qexp.ranges.MovingAverage": "qexp.grid.ranges.MovingAverage",
    "qexp.ranges.Percentile": "qexp.grid.ranges.Percentile",
    "qexp.ranges.RMS": "qexp.grid.ranges.RMS",
    "qexp.search.Resume": "qexp.sweeps.search.Resume",
    "qexp.share.GpuPool": "qexp.sweeps.gpu_pool.GpuPool",
    "qexp.trained.Trained": "qexp.training.trainable.TrainableParameters",
    "qexp.training.Trainer": "qexp.training.trainer.Trainer",
    "qexp.transforms.end_to_end.EndToEnd": "qexp.methods.quadapter.EndToEnd",
}
# class → {former field: current field}
RENAMED_FIELDS = {"qexp.grid.ranges.RMS": {"reach": "clip_at"}}


def renamed(tree: Any) -> Any:
    """A configuration (dicts, lists, values) with the current names of classes and fields."""
    if isinstance(tree, list):
        return [renamed(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    target = MOVED.get(str(tree.get("_target_")), tree.get("_target_"))
    fields = RENAMED_FIELDS.get(str(target), {})
    node = {fields.get(key, key): renamed(value) for key, value in tree.items()}
    return node | {"_target_": target} if "_target_" in tree else node
