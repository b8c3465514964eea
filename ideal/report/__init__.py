"""What a person sees of a run: console tables, figures, one page; and the mixture for other trainers."""

from ideal.report.export import export_mixture
from ideal.report.files import RunFiles, load_run
from ideal.report.page import render_report
from ideal.report.tables import final_summary, round_table

__all__ = ["RunFiles", "export_mixture", "final_summary", "load_run", "render_report", "round_table"]
