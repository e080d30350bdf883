"""Helm's own opinion of the chart: it lints, and renders every profile to the objects of install/manifests.

`make chart` runs this with Helm 4 as a library (PyPI: helm-python-sdk), for no registry of ours has the program.
"""

import copy
import pathlib
import sys

import helm_python
import yaml

INSTALL = pathlib.Path(__file__).resolve().parents[2]
CHART = INSTALL / "chart"
CASES = {name: {} for name in ("minimal", "default", "demo", "production")}
CASES["revision-canary"] = {"revision": "canary"}


def key(document):
    meta = document["metadata"]
    return document["apiVersion"], document["kind"], meta.get("namespace"), meta["name"]


def objects(texts):
    """By key; who renders is all that may differ."""
    found = {}
    for text in texts:
        for document in yaml.safe_load_all(text):
            if not document:
                continue
            document = copy.deepcopy(document)
            stack = [document]
            while stack:
                node = stack.pop()
                if isinstance(node, dict):
                    if node.get("app.kubernetes.io/managed-by") in ("Helm", "lateen"):
                        del node["app.kubernetes.io/managed-by"]
                    stack.extend(node.values())
                elif isinstance(node, list):
                    stack.extend(node)
            assert key(document) not in found, f"{key(document)} is there twice"
            found[key(document)] = document
    return found


def main():
    chart = helm_python.Chart.load(CHART)
    failures = 0
    crds = chart.crds
    assert crds, "the chart has no definitions of kinds"
    for name, values in CASES.items():
        profile = CHART / "profiles" / f"{name}.yaml"
        if profile.exists():
            values = yaml.safe_load(profile.read_text()) | values
        report = helm_python.chart.lint(CHART, values, namespace="default", kube_version="1.28.0")
        chart.validate_schema(values)
        rendered = chart.render(values, name="lateen", namespace="default")
        ours = objects([(INSTALL / "manifests" / f"{name}.yaml").read_text()])
        helms = objects(text for path, text in rendered.items() if path.endswith(".yaml"))
        wrong = [k for k in sorted(ours.keys() | helms.keys(), key=str) if ours.get(k) != helms.get(k)]
        for k in wrong:
            print(f"{name}: {k}:\n  ours {ours.get(k)}\n  helm {helms.get(k)}")
        # 1 is information, 2 a warning, 3 an error.
        errors = [m for m in report["messages"] if m["severity"] > 1] + report["errors"]
        for message in errors:
            print(f"{name}: lint: {message}")
        failures += len(wrong) + len(errors)
        print(f"{name}: {len(helms)} objects, {len(wrong)} differ; lint finds {len(errors)}")
    for bad in ({"pilot": {"replcas": 1}}, {"revision": "default"}, {"meshConfig": {"trustDomain": "x"}}):
        try:
            chart.validate_schema(chart.merge_values(bad))
        except helm_python.HelmError:
            continue
        print(f"Helm takes {bad}")
        failures += 1
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
