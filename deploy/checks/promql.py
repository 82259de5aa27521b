"""Which metrics and labels a query in PromQL names that there are none of."""

import re

import yaml

from conftest import DEPLOY, REPOSITORY

# What Prometheus and its service discovery add.
OF_TARGETS = {"namespace", "job", "instance"}
WORDS = """
    and or unless by without on ignoring group_left group_right offset bool sum min max avg count
    rate increase changes time vector absent histogram_quantile label_replace clamp_min
""".split()


def documented():
    """The metrics in the table of the README, each with its labels."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    metrics = {"up": set(), "ALERTS": {"alertname", "alertstate"}}
    for name, kind, labels in re.findall(r"^\| `(serin_\w+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE):
        found = set(re.findall(r"`(\w+)`", labels.split(": ")[0]))
        suffixes = {"_bucket": {"le"}, "_count": set(), "_sum": set()} if kind == "histogram" else {"": set()}
        metrics.update({name + suffix: found | more for suffix, more in suffixes.items()})
    process = text[text.index("The usual process metrics") :].split("\n\n")[0]
    metrics.update({name: set() for name in re.findall(r"`(process_\w+)`", process)})
    return metrics


def recorded():
    """The series that recording rules write, with the labels that their names tell."""
    with open(DEPLOY / "prometheus" / "rules" / "recording.yaml", encoding="utf-8") as file:
        names = [rule["record"] for group in yaml.safe_load(file)["groups"] for rule in group["rules"]]
    return {name: set(name.split(":")[0].split("_")) | {"le"} for name in names}


def unknown_names(expression):
    """Metrics that are neither documented nor recorded, and labels in braces that a metric does not have."""
    known = documented() | recorded()
    # Strings may hold anything, and ranges are no names.
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\[[^\]]*\]|offset \S+", "", bare)
    labels_in_lists = re.sub(r"\b(by|without|on|ignoring|group_left|group_right) ?\([^)]*\)", "", bare)
    unknown = set()
    for name, selector in re.findall(r"([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?", labels_in_lists):
        if name in WORDS:
            continue
        if name not in known:
            unknown.add(name)
            continue
        asked = set(re.findall(r"(\w+) ?(?:=~|!~|!=|=)", selector))
        unknown |= {f"{name}: {label}" for label in asked - known[name] - OF_TARGETS}
    return unknown
