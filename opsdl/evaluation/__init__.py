"""What training changed: evaluation items answered before and after, scores with intervals, reports and plots."""

from opsdl.evaluation.evaluate import evaluate
from opsdl.evaluation.report.markdown import format_table, write_report
from opsdl.evaluation.scoring import Accuracy, accuracy, found, gain

__all__ = ["Accuracy", "accuracy", "evaluate", "format_table", "found", "gain", "write_report"]
