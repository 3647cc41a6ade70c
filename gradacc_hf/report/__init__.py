"""`gradacc report`: one HTML page about runs, to read on a phone, print or send. It needs no network.

`read_runs` (runs.py) reads the folders. `write_report` writes the page in the template page.html.j2: the
verdict (narrative.py), tables (tables.py) and pictures (pictures.py, drawn by plots.py).
"""

from gradacc_hf.utils.extras import require

require(__name__, "report")

import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gradacc_hf.errors import refuse
from gradacc_hf.report import narrative as words
from gradacc_hf.report import plots
from gradacc_hf.report.pictures import (
    bars_of,
    curves_note,
    curves_of,
    dynamics_of,
    metrics_of,
    sizes_of,
    small_curves_of,
    windows_of,
)
from gradacc_hf.report.runs import RecordedRun, RunGroup, contenders, read_runs
from gradacc_hf.report.tables import (
    baseline_row,
    before_rows,
    configurations,
    details_of,
    distinct,
    dynamics_table,
    figures_table,
    plan_table,
    scored_sections,
    sources_table,
    teacher_rows,
)
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import redact

__all__ = ["read_runs", "write_report"]

GENERATOR = '<meta name="generator" content="gradacc-hf '


def write_report(folders: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write the report of the runs in these folders. Only the report.html inside a single folder is replaced.

    Args:
        folders: folders of runs, or folders that hold runs.
        output: a new HTML file. By default it is report.html in the folder. For several folders it is the
            first free of report.html, report-2.html, … in the current folder.

    Returns:
        The path of the report.

    Raises:
        InputError: if there is no run, a file is broken, or `output` exists.
    """
    folders = [Path(folder) for folder in folders]
    if output is not None and os.path.lexists(output):
        refuse("--output", f"{output} exists", "give another name, or move it")
    target = Path(output) if output is not None else _default_output(folders)
    runs = read_runs(folders)
    _check_output(target)
    page = render(runs)
    try:
        write_whole(target, page)
    except OSError as error:
        refuse("--output", f"{target} cannot be written ({error.strerror})", "give a file in another folder")
    return target


def verdict_of(folders: Sequence[Path | str]) -> words.Verdict:
    """Return the verdict of the report of the runs in these folders, without writing the report."""
    return words.verdict(contenders(read_runs([Path(folder) for folder in folders])))


def _default_output(folders: Sequence[Path]) -> Path:
    """Return report.html in a single folder, or the first free name in the current folder for several."""
    if len(folders) == 1:
        return folders[0] / "report.html"
    names = chain(["report.html"], (f"report-{number}.html" for number in count(2)))
    return next(Path(name) for name in names if not os.path.lexists(name))


def _check_output(target: Path) -> None:
    """Raise InputError for a file that is not a report, and for a link that came with a run."""
    unfinished = target.with_name(f".{target.name}.unfinished")  # as `write_whole` names it
    if unfinished.is_symlink():
        refuse("--output", f"{unfinished} is a link to {os.readlink(unfinished)}", "remove it")
    if target.suffix not in (".html", ".htm") or target.is_dir():
        refuse("--output", f"found {target}", "allowed: a file that ends in .html")
    if target.exists() and GENERATOR not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        refuse("--output", f"{target} exists and is not a report of gradacc", "give another name, or move it")


def page_template(folder: Path) -> jinja2.Template:
    """Return the template page.html.j2 in a folder. Values are escaped, and a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def render(runs: Sequence[RecordedRun]) -> str:
    """Return the page as HTML."""
    found = contenders(runs)
    titles, table = figures_table(found)
    return page_template(Path(__file__).parent).render(
        generator=f"gradacc-hf {version('gradacc-hf')}",
        title=_title(runs),
        subtitle=_subtitle(runs),
        date=time.strftime("%Y-%m-%d %H:%M"),
        verdict=words.verdict(found),
        notes=[(run.name, note) for run in runs for note in (*run.notes, run.small_set) if note],
        titles=titles,
        table=table,
        before=before_rows(found, titles),
        baseline=baseline_row(found, titles),
        teacher=teacher_rows(found, titles) if len(found) == 1 else [],
        sources=sources_table(found),
        keys=_keys(found, "table"),
        legend=[
            (contender.label, key) for contender, key in zip(found, _keys(found, "legend"), strict=False)
        ],
        curves=curves_of(found),
        small_curves=small_curves_of(found),
        curves_note=curves_note(found),
        dynamics=dynamics_of(found),
        dynamics_table=dynamics_table(found),
        noise=words.noise(found),
        metrics=metrics_of(found),
        bars=bars_of(found),
        sizes=sizes_of(found),
        windows=windows_of(found),
        scored=scored_sections(runs),
        details=[(run.name, details_of(run.details)) for run in runs if run.details],
        samples=[(run.name, run.samples) for run in runs if run.samples],
        plan=plan_table(found),
        readings=distinct(runs, lambda run: run.reading),
        several=len(found) > 1,
        repeated=max(len(contender.runs) for contender in found) > 1,
        configurations=configurations(runs),
        versions=distinct(runs, _versions),
        commands=distinct(runs, lambda run: str(run.summary.get("command") or "")),
    )


def _versions(run: RecordedRun) -> str:
    return " · ".join(f"{name} {number}" for name, number in (run.summary.get("versions") or {}).items())


def _keys(found: Sequence[RunGroup], name: str) -> list[Markup]:
    """Return a line sample for each contender, if there are several."""
    return [plots.key(f"{name}{look}", look) for look in range(len(found))] if len(found) > 1 else []


def _title(runs: Sequence[RecordedRun]) -> str:
    """Return the name of the run, or of the folder that holds all runs."""
    if len(runs) == 1:
        return runs[0].name
    return redact(os.path.basename(os.path.commonpath([run.folder.resolve() for run in runs]))) or "runs"


def _named(value: Any) -> str:
    """Return a model, a data set, or the sources of a mixture as text."""
    sources = value if isinstance(value, list) else [value]
    return ", ".join(str(one.get("source")) if isinstance(one, dict) else str(one) for one in sources)


def _subtitle(runs: Sequence[RecordedRun]) -> str:
    """Return the model, the data, and the number of runs."""
    settings = (("model", "name"), ("data", "train"))
    values = [[_named(v) for run in runs if (v := run.setting(*setting))] for setting in settings]
    what = " on ".join(words.in_words(list(dict.fromkeys(names))) for names in values if names)
    return " · ".join(filter(None, [what, f"{len(runs)} run{'s' * (len(runs) != 1)}"]))
