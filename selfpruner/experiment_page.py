"""The page of an experiment: one self-contained HTML file that looks like the report of a run."""

from __future__ import annotations

from pathlib import Path

from selfpruner.experiment_study import ALPHA, LEAST_UNITS, Study, read_off, unit_of
from selfpruner.experiment_table import COLUMNS, different_machines, lines, token_lines
from selfpruner.report import page_environment, write_page


def write_experiment_page(study: Study, file: Path, out: Path) -> Path:
    """Write the page of `study`, whose experiment is described in `file`, and return its path."""
    from selfpruner import experiment_charts as charts

    compared = study.comparisons(study.control) if study.control is not None else []
    units = {unit_of(row) for row in study.rows}
    text = page_environment().get_template("experiment.html.j2").render(
        study=study,
        verdict=study.verdict(),
        columns=COLUMNS,
        lines=lines(study),
        warning=different_machines(study),
        token_lines=token_lines(study),
        difference=charts.difference_chart(study, compared),
        courses=[
            (model, budget, charts.course_chart(study, model, budget, "evaluations"),
             charts.course_chart(study, model, budget, "tokens"))
            for model, budget in study.settings
        ],
        units=max((x.units for x in compared), default=0),
        seeds=len({seed for _, _, seed in units}),
        cells=[
            (row["cell"], row["figures"], read_off(row["figures"], "evaluations", study.limit))
            for row in study.rows
        ],
        alpha=ALPHA,
        least_units=LEAST_UNITS,
        seconds=sum(row["figures"]["seconds"] for row in study.rows),
        file=file.name,
        source=file.read_text(encoding="utf-8"),
    )  # fmt: skip
    return write_page(out, text)
