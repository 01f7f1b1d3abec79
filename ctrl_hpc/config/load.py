"""Reading and writing a configuration.

Later ones win: the defaults of the dataclasses, the cluster profile, the YAML file, ``a.b=c`` overrides.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from ctrl_hpc.config.facts import IsPath, facts, is_url
from ctrl_hpc.config.tree import Config, check, value

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package: the project's in a checkout, else site-packages or a run's copy of the code."""
_INSTALLED = ROOT / "ctrl_hpc" / "share"
SHARE = _INSTALLED if _INSTALLED.is_dir() else ROOT
"""Where ``configs``, ``models`` and ``slurm`` lie: within an installed package, in a checkout the project's folder."""
_REMOVED = {"tiny.models": "generator and critic.model name the folders"}
"""Keys of earlier versions, which the configurations of old runs still hold (ignored there), and what to use now."""

_ALWAYS = frozenset(
    "data tiny prompts critic sample synthesize sft rl eval trainer parallel executor rollout launch wandb".split()
)
"""Sections that every version has had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One of the places that values come from."""

    where: str
    tree: Any
    """What it sets, as OmegaConf's container."""
    lines: dict[str, int] = field(default_factory=dict)
    """The line of each key, in a file."""

    def origin(self, key: str) -> str | None:
        """Where it sets a key; None where it does not."""
        node = self.tree
        for part in key.split("."):
            if not OmegaConf.is_dict(node) or part not in node:
                return None
            node = node._get_node(part)
        return f"{self.where}:{self.lines[key]}" if key in self.lines else self.where


def load(path: str | Path, overrides: Sequence[str] = (), *, validate: bool = True) -> Config:
    """The configuration of a YAML file, or a packaged one by its name, with ``a.b=c`` overrides.

    Relative model and data paths that do not exist from the working directory are taken from the folder above
    ``configs``, the project's or the package's. Raises ValueError with one line that names the key, the value and what
    is allowed.
    Without ``validate`` values are taken as they are, as of a run whose files may have moved since.
    """
    config, _ = load_with_layers(path, overrides)
    if validate:
        check(config)
    return config


def load_with_layers(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Layer]]:
    """A configuration whose values have not been checked, and what it was made of, the winning layer last."""
    path = find(path)
    file = _file(path)
    whole = _is_whole(file.tree)
    if whole:
        for key in _REMOVED:
            section, _, name = key.rpartition(".")
            OmegaConf.select(file.tree, section).pop(name, None)
    extra = Layer(where="override", tree=_worded(OmegaConf.merge(*map(_override, overrides))) if overrides else {})
    given = _merged([file, extra])
    chosen = any(text.startswith("cluster=") for text in overrides)
    # a run's own config.yaml says all that its profile, which may be gone, had said
    profile = _profile(str(given.cluster), path) if chosen or not whole else None
    layers = [file, extra] if profile is None else [_file(profile), file, extra]
    merged = given if profile is None else _merged(layers)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"{path}: {missing[0]}: missing; every configuration names it")
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return _shaped(_absolute_paths(config, path)), layers


def origin(layers: Sequence[Layer], key: str) -> str:
    """Where the value of a key comes from: ``FILE:LINE``, ``override`` or ``default``."""
    return next((found for layer in reversed(layers) if (found := layer.origin(key))), "default")


def find(given: str | Path, folder: str = "") -> Path:
    """A configuration's file: as given, or a packaged one by its name (``tiny``) or path (``configs/tiny.yaml``).

    ``folder`` is that of ``configs`` to look in, such as ``suite``. A file that is nowhere is returned as given.
    """
    path = Path(given).expanduser()
    if path.exists() and not (path.is_dir() and packaged(str(given), folder)):
        return path
    return packaged(str(given), folder) or path


def packaged(given: str, folder: str = "") -> Path | None:
    """The packaged configuration that a name or a path of the form ``configs/NAME.yaml`` means; None: there is none."""
    if given.startswith("configs/"):
        file = SHARE / given
    else:
        file = SHARE / "configs" / folder / (given if given.endswith(".yaml") else f"{given}.yaml")
    return file if file.is_file() and SHARE / "configs" in file.parents else None


def packaged_names(folder: str = "") -> list[str]:
    """The names of the packaged configurations."""
    return sorted(file.stem for file in (SHARE / "configs" / folder).glob("*.yaml"))


def no_such(path: Path, what: str, folder: str = "") -> str:
    """``PATH: no such WHAT``, with the nearest file beside it, or the nearest packaged name, or all of these."""
    beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    names = packaged_names(folder) if path.name == str(path) else []
    near = close_to(path.name, [*beside, *names])
    return f"{path}: no such {what}{near or ('; packaged: ' + ', '.join(names) if names else '')}"


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included; ``load`` reads it back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def close_to(name: str, names: Sequence[str]) -> str:
    """`` (did you mean NAME?)`` for the nearest of some names; empty where none is near."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _is_whole(file: Any) -> bool:
    """Whether a file gives every section, as :func:`dump` writes them; an earlier version's has not the newer ones."""
    launch = file.get("launch")
    roles = {"trainer", "rollout", "executor"}
    return set(file) >= _ALWAYS and OmegaConf.is_dict(launch) and roles <= set(launch)


def _file(path: Path) -> Layer:
    if not path.is_file():
        raise ValueError(
            f"{path}: is a folder, no configuration" if path.is_dir() else no_such(path, "configuration file")
        )
    try:
        tree = OmegaConf.load(path)
        lines = dict(_lines(yaml.compose(path.read_text(encoding="utf-8")), ""))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: is not a configuration; expected KEY: VALUE on each line")
    return Layer(where=str(path), tree=_worded(tree), lines=lines)


def _worded(tree: Any) -> Any:
    """A tree in which ``on`` and ``off`` are words where a key takes these: YAML 1.1 reads them as true and false."""
    for key, fact in facts(Config).items():
        if "on" in fact.choices and isinstance(OmegaConf.select(tree, key, throw_on_missing=False), bool):
            OmegaConf.update(tree, key, "on" if OmegaConf.select(tree, key) else "off")
    return tree


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    """Every dotted key of a YAML document with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(item, f"{prefix}{key.value}.")


def _override(text: str) -> Any:
    key, equals, item = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r}: expected KEY=VALUE, for example rl.steps=50")
    # wandb sweeps write Python's None
    item = "null" if item == "None" else item
    try:
        return OmegaConf.from_dotlist([f"{key}={item}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {text!r}: {_one_line(error)}") from None


@functools.cache
def _schema() -> Any:
    """The defaults, with the type of each key; a merge copies it."""
    return OmegaConf.structured(Config)


def _merged(layers: Sequence[Layer]) -> Any:
    schema = _schema()
    with contextlib.suppress(OmegaConfBaseException):  # told below, of the layer that it lies in
        return OmegaConf.merge(schema, *(layer.tree for layer in layers))
    for layer in layers:
        try:
            schema = OmegaConf.merge(schema, layer.tree)
        except OmegaConfBaseException as error:
            raise ValueError(f"{layer.where}: {_explain(error, schema, layer.tree)}") from None
    return schema


def _explain(error: OmegaConfBaseException, base: Any, extra: Any) -> str:
    key = error.full_key
    if isinstance(error, ConfigKeyError) and key:
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(base, section) if section else base
        allowed = sorted(map(str, parent)) if OmegaConf.is_dict(parent) else []
        if key in _REMOVED:
            return f"{key}: is a key no more; {_REMOVED[key]}"
        elsewhere = [other for other in facts(Config) if other.endswith(f".{name}")]
        below = [other for other in elsewhere if other.startswith(f"{section}.")] or elsewhere
        hint = f" (did you mean {' or '.join(below[:3])}?)" if below else close_to(name, allowed)
        return f"{key}: unknown key{hint}; allowed: {', '.join(allowed)}"
    if not key:  # a section given as a plain value: find which
        for name in extra:
            if OmegaConf.is_dict(OmegaConf.select(base, str(name))) and not OmegaConf.is_dict(extra[name]):
                return f"{name}: {extra[name]!r} is not a section; write {name}.KEY=VALUE"
        for name, item in _leaves(OmegaConf.to_container(extra), ""):  # an element of a list has no key either
            try:
                OmegaConf.merge(base, functools.reduce(lambda inner, part: {part: inner}, name.split(".")[::-1], item))
            except OmegaConfBaseException as own:
                said = _one_line(own).replace(" of type '$VALUE_TYPE'", "").replace("'$VALUE'", str(item))
                return f"{name}: {said}"
    said = _one_line(error)
    if key and said.endswith("is not a TupleConfig, ListConfig, list, or tuple."):
        return f"{key}: {OmegaConf.select(extra, key)!r} is not a list; write {key}=[A,B]"
    return f"{key}: {said}"


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The values of a tree by dotted key."""
    for key, item in tree.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _profile(name: str, path: Path) -> Path | None:
    """The file of a cluster profile: a path, or a name looked up beside the configuration and in the project."""
    places = [Path(name).expanduser()] if name.endswith((".yaml", ".yml")) else []
    beside = [path.parent / "cluster", path.parent.parent / "cluster", Path("configs/cluster")]
    folders = [*beside, SHARE / "configs" / "cluster"]
    places += [folder / f"{name}.yaml" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    if name == "local":
        return None
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")} | {"local"})
    raise ValueError(
        f"cluster: {name!r} is not a profile{close_to(name, names)}; allowed: {', '.join(names)}, or the path of a "
        "YAML file"
    )


def _absolute_paths(config: Config, file: Path) -> Config:
    roots = [Path.cwd(), *file.resolve().parents, SHARE]

    def absolute(text: str, kind: IsPath) -> str:
        if (
            not text
            or is_url(text)
            or text in kind.names
            or (kind.function and ":" not in text)
            or (kind.or_name and "/" not in text)
        ):
            return text
        place, sign, function = text.rpartition(":") if kind.function else (text, "", "")
        path = Path(place).expanduser()
        if not path.is_absolute():
            path = next((root / path for root in roots if (root / path).exists()), Path.cwd() / path)
        return f"{path}{sign}{function}"

    run_dir = Path(config.run_dir or Path("runs") / config.name).expanduser().absolute()
    out = replace(config, run_dir=str(run_dir))
    for key, fact in facts(Config).items():
        kind, found = fact.said(IsPath), value(config, key)
        if kind is not None and found:
            if isinstance(found, dict):
                out = _replaced(out, key, {name: absolute(place, kind) for name, place in found.items()})
            else:
                out = _replaced(out, key, absolute(found, kind))
    return out


def _replaced(section: Any, key: str, item: Any) -> Any:
    """A section with another value at a dotted key."""
    name, _, rest = key.partition(".")
    return replace(section, **{name: _replaced(getattr(section, name), rest, item) if rest else item})


def _shaped(config: Config) -> Config:
    """With ``eval.widths``, the number of drafts and of turns that it says."""
    widths = config.eval.widths
    if len(widths) < 2 or min(widths) < 1:  # none, or wrong, which the check says
        return config
    return replace(config, eval=replace(config.eval, n_samples=widths[0], turns=len(widths) - 1))
