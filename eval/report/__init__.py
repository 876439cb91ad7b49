"""What a finished run says: statistics, plots, an HTML page and a Markdown page."""

from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.write import write_report

__all__ = ["Held", "Throughput", "write_report"]
