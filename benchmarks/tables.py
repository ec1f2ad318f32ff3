"""Plain text tables for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text under headings.

    Parameters
    ----------
    headings
        One heading a column; a column whose heading starts with ``<`` is set flush left.
    rows
        The cells; an empty row becomes a rule.

    Returns
    -------
    str
        The table, without a final line break.
    """
    names = [heading.removeprefix("<") for heading in headings]
    widths = [
        max([len(name), *(len(row[column]) for row in rows if row)])
        for column, name in enumerate(names)
    ]
    rule = "  ".join("-" * width for width in widths)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if heading.startswith("<") else cell.rjust(width)
            for cell, width, heading in zip(cells, widths, headings, strict=True)
        ).rstrip()

    return "\n".join([line(names), rule, *(line(row) if row else rule for row in rows)])
