"""``ctrl-hpc config``: what a key means and allows, and where the values of a configuration come from."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_hpc.config import Config
    from ctrl_hpc.config.facts import Fact
    from ctrl_hpc.config.load import Layer


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("targets", nargs="*", metavar="KEY|CONFIG.yaml", help="a key or section, and a configuration")
    parser.set_defaults(command=run, overrides=[])


def run(options: argparse.Namespace) -> int:
    """A key explained; without one, the tree of a configuration, or of the defaults, with the origin of each value."""
    from ctrl_hpc.config.load import load_with_layers, packaged
    from ctrl_hpc.config.tree import check, known

    overrides = [*(text for text in options.targets if "=" in text), *options.overrides]
    targets = [text for text in options.targets if "=" not in text]
    files = [text for text in targets if text.endswith((".yaml", ".yml")) or (text not in known() and packaged(text))]
    keys = [text for text in targets if text not in files]
    if len(files) > 1 or len(keys) > 1:
        raise ValueError(
            f"config: one key and one configuration at a time, not {' '.join(files if files[1:] else keys)}"
        )
    if overrides and not files:
        raise ValueError(f"config: {overrides[0]!r}: overrides go with a configuration; name its file")
    config, layers = load_with_layers(files[0], overrides) if files else (None, [])
    if config is not None:
        check(config)
    lines = explained(keys[0], config, layers) if keys else tree(config, layers)
    print("\n".join(lines))
    return 0


def explained(key: str, config: Config | None, layers: Sequence[Layer]) -> list[str]:
    """What there is to say of a key, in lines; of a section, a line for each of its keys.

    Raises ValueError for an unknown key, naming those that are near.
    """
    from ctrl_hpc.config.tree import Config, known

    fact = _known(key)
    key = fact.key
    if fact.is_section:
        below = [other for other in known().values() if other.key.startswith(f"{key}.") and not other.is_section]
        told = [f"  {other.key}: {_default(other.key)}  # {other.about}" for other in below]
        return (
            [f"{key}: {fact.about} Keys with their defaults:", *told]
            if config is None
            else [
                f"{key}: {fact.about}",
                *(f"  {line}" for line in _listed(config, layers, under=f"{key}.")),
            ]
        )
    out = [f"{key}: {fact.about}", f"  type:     {fact.type_name}"]
    if fact.allowed:
        out.append(f"  allowed:  {fact.allowed}")
    default = _default(key)
    out += [f"  default:  {'none; every configuration names it' if default is None else default}"]
    out.append(f"  example:  {shlex.quote(f'{key}={_example(fact)}')}")
    if config is not None:
        out.append(f"  value:    {_shown(_value(config, key))}, from {_origin(layers, config, key)}")
    if fact.free:
        out.append("  may change between two starts of one run: no result depends on it")
    elif stages := _readers(key, config or Config(name="any")):
        out.append(f"  fixed once there are records of {', '.join(stages)}, which read it")
    return out


def tree(config: Config | None, layers: Sequence[Layer]) -> list[str]:
    """Every key with its value and where that comes from; of the defaults where there is no configuration."""
    return _listed(config, layers, under="")


def _listed(config: Config | None, layers: Sequence[Layer], under: str) -> list[str]:
    from ctrl_hpc.config.tree import known

    out = []
    for key, fact in known().items():
        if key.startswith(under) and not fact.is_section:
            shown = _default(key) or "(none)" if config is None else _shown(_value(config, key))
            origin = "" if config is None else f"  # {_origin(layers, config, key)}"
            out.append(f"{key}: {shown}{origin}")
    return out


def _known(key: str) -> Fact:
    from ctrl_hpc.config.load import close_to
    from ctrl_hpc.config.tree import known

    facts = known()
    same = [key] if key in facts else [other for other in facts if other.endswith(f".{key}")]
    if len(same) > 1:
        raise ValueError(f"config: {key}: which? {', '.join(same)}")
    if not same:
        raise ValueError(f"config: {key}: unknown key{close_to(key, list(facts))}; `ctrl-hpc config` lists all")
    return facts[same[0]]


def _readers(key: str, config: Config) -> list[str]:
    from ctrl_hpc.config.changes import concerns, reads
    from ctrl_hpc.config.stages import STAGES

    return [stage for stage in STAGES if concerns(key, reads(stage, config))]


def _value(config: Config, key: str) -> Any:
    from ctrl_hpc.config import value

    return value(config, key)


def _origin(layers: Sequence[Layer], config: Config, key: str) -> str:
    from ctrl_hpc.config.load import origin

    if config.eval.widths and key in ("eval.n_samples", "eval.turns"):
        return f"eval.widths, {origin(layers, 'eval.widths')}"
    return origin(layers, key)


def _default(key: str) -> str | None:
    """The default of a key as one would write it; None where it has none."""
    from ctrl_hpc.config import Config, value

    return None if key == "name" else _shown(value(Config(name=""), key))


def _shown(item: Any) -> str:
    """A value as one would write it in a file, on one line."""
    import yaml

    plain = list(item) if isinstance(item, tuple) else item
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def _example(fact: Fact) -> str:
    """A value that the key takes, another than its default where one can be told from its facts."""
    from ctrl_hpc.config.facts import Example, IsPath

    example = fact.said(Example)
    default = _default(fact.key)
    if example is not None:
        return example.text
    if fact.choices:
        return next((word for word in fact.choices if word != default), fact.choices[0])
    if default in ("true", "false"):
        return {"true": "false", "false": "true"}[default]
    if default not in (None, "null", "[]", "{}", ""):
        return str(default)
    name = fact.key.rpartition(".")[2].upper()
    one = {int: "2", float: "2.0", bool: "true"}.get(fact.element, f"PATH/TO/{name}" if fact.said(IsPath) else name)
    return {"[]": f"[{one}]", "{}": f"{{NAME: {one}}}"}.get(str(default), one)
