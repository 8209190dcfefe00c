"""The package's rooms import downward only, and nothing reaches past what the energy's room shows."""

import ast
from pathlib import Path

import numpyro_score

ROOT = Path(numpyro_score.__file__).parent
# From the bottom up. A room may import the rooms before it, and modules of its own.
ROOMS = [
    "version",
    "models",
    "operators",
    "random",
    "closures",
    "programs",
    "placement",
    "printed",
    "labels",
    "energy",
    "kernels",
    "flows",
    "losses",
    "generalized",
    "uncertainty",
    "closed_form",
    "arviz",
    "normaliser",
    "inference",
    "diffusion",
    "divergences",
    "comparison",
    "plots",
    "reporting",
]


def modules():
    """Every module of the package but its face, as its dotted name below the package, and its tree."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())


def imported(node):
    """The modules of the package that a statement imports, below the package."""
    if isinstance(node, ast.Import):
        found = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        whole = [a.name for a in node.names] if node.module == "numpyro_score" else []
        found = [f"numpyro_score.{n}" for n in whole] or [node.module]
    else:
        return []
    return [f.removeprefix("numpyro_score.") for f in found if f.startswith("numpyro_score")]


def test_every_room_is_listed():
    """The list is bottom up and complete."""
    assert {name.partition(".")[0] for name, _ in modules()} == set(ROOMS)


def test_imports_go_downward():
    upward = [
        f"{name} imports {target}"
        for name, tree in modules()
        for node in ast.walk(tree)
        for target in imported(node)
        if ROOMS.index(target.partition(".")[0]) > ROOMS.index(name.partition(".")[0])
    ]
    assert not upward


def test_no_circle_within_a_room():
    """Modules import each other one way too; the face of a room imports its modules, and none of them the face."""
    arrows = {}
    for name, tree in modules():
        targets = {t for node in ast.walk(tree) for t in imported(node)}
        arrows[name] = {t for t in targets if t.partition(".")[0] == name.partition(".")[0]}
    done = set()
    while ready := [n for n, to in arrows.items() if n not in done and to <= done]:
        done.update(ready)
    assert done == set(arrows), f"a circle among {sorted(set(arrows) - done)}"


def test_no_import_is_hidden():
    """None of the package's inside a function, nor for type checkers alone."""
    hidden = [
        f"{name} line {node.lineno}"
        for name, tree in modules()
        for top in tree.body
        if not isinstance(top, ast.Import | ast.ImportFrom)
        for node in ast.walk(top)
        if imported(node) or (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING")
    ]
    assert not hidden


def test_the_energy_is_known_by_its_face():
    """Its modules and private attributes are used in its own room alone."""
    private = {"_layout", "_run", "_arrays", "_static", "_pinned", "_plates", "_choice", "_places", "_axes"}
    inside = [
        f"{name} line {node.lineno}"
        for name, tree in modules()
        if name.partition(".")[0] != "energy"
        for node in ast.walk(tree)
        if any(t.startswith("energy.") for t in imported(node))
        or (isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self")
    ]
    assert not inside


def test_files_hold_one_idea():
    """No file has more than 400 lines."""
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert not {p: n for p, n in lengths.items() if n > 400}
