"""What the checks of meshes and of gateways share: an overlay together with one of their components, and what
a README says about serin.yaml.
"""

import re
import shutil

import yaml

from conftest import DEPLOY
from manifests import build

# Where components are, and what they are put upon.
PARTS = ["gateway", "kubernetes", "mesh"]


def copied(directory):
    """A copy of the parts of deploy/ that belong together."""
    for part in PARTS:
        shutil.copytree(DEPLOY / part, directory / part)
    return directory


def compose(tools, root, component):
    """The objects of the overlay `production` with a component, as the README beside it tells."""
    overlay = root / "kubernetes" / "overlays" / component.replace("/", "-")
    overlay.mkdir()
    readme = root / component.partition("/")[0] / "README.md"
    content = overlay_in(readme) | {"components": [f"../../../{component}"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return build(tools, overlay)


def only_those_of(component, objects):
    """The objects that come from a component's own files."""
    files = (DEPLOY / component).glob("*.yaml")
    own = {
        (document["kind"], document["metadata"]["name"])
        for file in files
        for document in yaml.safe_load_all(file.read_text())
        if document["kind"] != "Component"
    }
    return [item for item in objects if (item["kind"], item["metadata"]["name"]) in own]


def outside_of(namespace, objects):
    """What would get somewhere else."""
    without = ("Namespace", "PriorityClass")
    return [
        f"{item['kind']} {item['metadata']['name']}"
        for item in objects
        if item["kind"] not in without and item["metadata"].get("namespace") != namespace
    ]


def overlay_in(readme):
    """The kustomization of an overlay with a component, as a README has it."""
    (block,) = [block for block in blocks_of(readme) if "kind: Kustomization" in block]
    return yaml.safe_load(block)


def blocks_of(readme):
    return re.findall(r"^```yaml\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)


def listeners_in(readme):
    """What a README says that the listeners of serin.yaml should be, each time that it does."""
    return [yaml.safe_load(block)["listeners"] for block in blocks_of(readme) if "listeners:" in block]


def with_listeners(listeners):
    """The overlay's serin.yaml with other listeners."""
    file = DEPLOY / "kubernetes" / "overlays" / "production" / "config" / "serin.yaml"
    return yaml.safe_load(file.read_text()) | {"listeners": listeners}
