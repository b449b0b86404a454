"""What training changed: evaluation items answered before and after, scores with intervals, reports and plots."""

from opsdl.evaluation.compare import gains
from opsdl.evaluation.evaluate import evaluate
from opsdl.evaluation.report import format_table, write_report
from opsdl.evaluation.results import EvaluationResult, Sample, SetResult
from opsdl.evaluation.scoring import Accuracy, accuracy, gain

__all__ = [
    "Accuracy", "EvaluationResult", "Sample", "SetResult", "accuracy", "evaluate", "format_table", "gain", "gains",
    "write_report",
]  # fmt: skip
