"""The page of a first run, in Markdown."""

from __future__ import annotations

from typing import Any

HEAD = """# A first run on {card}

{date}. Every number here was **measured** in this run, by `python -m benchmarks.gpu`; the JSON file
of the same name has all of them.
"""


def page_of(report: dict[str, Any]) -> str:
    """Outcomes, versions, and a table for each list of rows that a part wrote."""
    lines = [HEAD.format(card=report["card"], date=report["date"])]
    lines += table(
        [
            {
                "part": found["title"],
                "outcome": found["outcome"],
                "s": f"{found['seconds']:.0f}",
                "why": found["reason"],
            }
            for found in report["parts"]
        ]
    )
    lines += ["", "## Where", ""]
    lines += [f"- {name}: {text}" for name, text in _flat(report["environment"]).items()]
    for found in report["parts"]:
        rows = (found["result"] or {}).get("rows")
        if rows:
            lines += ["", f"## {found['title']}", "", *table(rows)]
        if found["outcome"] == "failed":
            lines += ["", f"## {found['title']}: how it failed", "", "```"]
            lines += [*found["output"].splitlines()[-30:], "```"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; the columns are all names that any row has, in order."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (_cell(row.get(name, "")) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}, ")
        else:
            found[f"{above}{name}"] = value
    return found
