"""Draw the panels of dashboard.json from a Prometheus, where no Grafana is at hand.

Checked: run, against Prometheus 2.42.

    python deploy/monitoring/draw_dashboard.py http://127.0.0.1:9090 dashboard.png [MINUTES]

Every query is sent to Prometheus, as Grafana would; one that it refuses ends the script with its message.
"""

import json
import sys
import time
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot  # after the backend is chosen

POINTS = 240
VARIABLES = {"$run": ".*", "$server": ".*", "$__rate_interval": "60s"}
COLUMNS = 24
"""Width of Grafana's grid."""
INCHES = 0.9, 0.42
"""Width and height of a cell of the grid."""


def main() -> None:
    """Ask, draw, write the picture."""
    url, picture = sys.argv[1], Path(sys.argv[2])
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 15.0
    dashboard = json.loads((Path(__file__).parent / "dashboard.json").read_text("utf-8"))
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = pyplot.figure(figsize=(COLUMNS * INCHES[0], height * INCHES[1]))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        axes = figure.add_axes(
            (
                (place["x"] + 0.7) / COLUMNS,
                1 - (place["y"] + place["h"] - 0.9) / height,
                (place["w"] - 1.1) / COLUMNS,
                max(place["h"] - 2.2, 0.1) / height,
            )
        )
        if panel["type"] == "row":
            axes.axis("off")
            axes.text(0, 0, panel["title"], fontsize=14, weight="bold")
            continue
        axes.set_title(panel["title"], loc="left", fontsize=10)
        series = [
            (legend(target["legendFormat"], found["metric"]), found["values"])
            for target in panel["targets"]
            for found in ask(url, target["expr"], minutes)
        ]
        (draw_stat if panel["type"] == "stat" else draw_lines)(axes, series)
    figure.savefig(picture, dpi=55, bbox_inches="tight")


def ask(url: str, query: str, minutes: float) -> list[dict[str, Any]]:
    """Return the series that answer a query over the last minutes."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    now = time.time()
    seconds = minutes * 60
    form = urlencode({"query": query, "start": now - seconds, "end": now, "step": max(seconds / POINTS, 1)})
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "127.0.0.1", where.port or 9090, timeout=30)
    connection.request("GET", f"{where.path}/api/v1/query_range?{form}")
    answer = connection.getresponse()
    body = json.load(answer)
    if answer.status != HTTPStatus.OK:
        sys.exit(f"{query}: {body['error']}")
    found: list[dict[str, Any]] = body["data"]["result"]
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    """Fill in the labels, as Grafana does."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value.removeprefix("http://"))
    return template


def draw_stat(axes: Any, series: list[tuple[str, list[Any]]]) -> None:
    """Write the last value of each series."""
    axes.axis("off")
    axes.text(
        0, 0.2, "\n".join(f"{float(values[-1][1]):,.4g} {name}" for name, values in series), fontsize=13
    )


def draw_lines(axes: Any, series: list[tuple[str, list[Any]]]) -> None:
    """Draw each series over time."""
    for name, values in series:
        axes.plot(
            [(at - time.time()) / 60 for at, _ in values],
            [float(value) for _, value in values],
            label=name,
            linewidth=1,
        )
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=7, loc="upper left")


if __name__ == "__main__":
    main()
