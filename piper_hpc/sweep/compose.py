"""`-m`: the points of a command, and their configurations.

Hydra runs the command with the first point's words, and so finds files and reads flags as ever. Each combination of
groups is composed once; values of keys are put into copies of that, as Hydra's own sweeper would compose every point
anew, a tenth of a second each, and starts one before it knows whether the next makes sense.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from piper_hpc.config import ConfigError, Problem

FLAGS = ("-m", "--multirun")


@dataclass(frozen=True)
class Grid:
    """What `-m` asks for: the words of every point, and the values of what is swept; flags: words that are no
    overrides, which all points share."""

    flags: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    axes: tuple[dict[str, Any], ...]


def grid_of(command: Sequence[str]) -> Grid | None:
    """The points of a command's words, the last key changing fastest; None of a command without `-m`.

    A key that is given twice counts as it was given last. Raises ConfigError for a sweep that is no list of values.
    """
    if not any(word in FLAGS for word in command):
        return None
    parser = OverridesParser.create()
    flags: list[str] = []
    given: dict[str, Override] = {}
    for word in command:
        try:
            override = parser.parse_override(word)
        except HydraException:  # a flag or its value; what is wrong with a word Hydra says itself
            if word not in FLAGS:
                flags.append(word)
            continue
        given[override.get_key_element()] = override
    swept = [override.key_or_group for override in given.values() if override.is_sweep_override()]
    words = list(itertools.product(*(_values(key, override) for key, override in given.items())))
    axes = []
    for point in words:
        values = (parser.parse_override(word) for word in point)
        axes.append({one.key_or_group: one.value() for one in values if one.key_or_group in swept})
    return Grid(tuple(flags), tuple(words), tuple(axes))


def _values(key: str, override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        rule = "a sweep needs a list of values"
        raise ConfigError(Problem(key, str(override.input_line), rule, f"{key}=1,2 or 'key=range(1,9)'"))
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


@dataclass
class Composer:
    """Composes the points of a grid, where Hydra is initialized. overrides: of Hydra's own keys, for all points."""

    grid: Grid
    config_name: str
    overrides: tuple[str, ...] = ()
    _bases: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    _groups: dict[str, bool] = field(default_factory=dict)
    _parsed: dict[str, Override] = field(default_factory=dict)

    def config(self, index: int) -> DictConfig:
        """What Hydra would compose of a point's words, as a copy of the caller's own.

        Raises Hydra's errors for words that compose to nothing.
        """
        running = GlobalHydra.instance().hydra
        assert running is not None and isinstance(running.config_loader, ConfigLoaderImpl)
        loader = running.config_loader
        parsed = [self._parse(word, loader) for word in self.grid.words[index]]
        # As Hydra tells a group's option from a key's value.
        is_group = {one.key_or_group: self._is_group(one.key_or_group, loader) for one in parsed}
        groups = [one for one in parsed if is_group[one.key_or_group] and not isinstance(one.value(), dict)]
        composed = deepcopy(self._base(tuple(str(one.input_line) for one in groups)))
        loader._apply_overrides_to_config([one for one in parsed if one not in groups], composed)
        return composed

    def _base(self, groups: tuple[str, ...]) -> DictConfig:
        if groups not in self._bases:
            self._bases[groups] = hydra.compose(self.config_name, [*self.overrides, *groups])
        return self._bases[groups]

    def _parse(self, word: str, loader: ConfigLoaderImpl) -> Override:
        if word not in self._parsed:
            self._parsed[word] = OverridesParser.create(config_loader=loader).parse_override(word)
        return self._parsed[word]

    def _is_group(self, key: str, loader: ConfigLoaderImpl) -> bool:
        if key not in self._groups:
            self._groups[key] = bool(loader.get_group_options(key))
        return self._groups[key]
