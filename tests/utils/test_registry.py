"""Methods from outside: the decorator, and entry points of installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import raypp
from raypp.config.presets import load_config
from raypp.protections import PROTECTIONS
from raypp.utils.errors import ConfigError
from raypp.utils.registry import MethodConfig

PLUGIN = '''
from typing import Literal

import raypp
from raypp.utils.registry import MethodConfig


class Invert(raypp.Protection):
    """Inverts every value, from a package."""

    class Options(MethodConfig):
        name: Literal["invert"] = "invert"
        strength: float = 1.0

    def forward(self, images):
        return images + self.options.strength * (1 - 2 * images)


class Gray(raypp.Attack):
    """Returns gray images, from a package."""

    threat = raypp.attacks.base.Threat.T0

    def reconstruct(self, protected):
        return protected * 0 + 128
'''
ENTRY_POINTS = """
[raypp.protections]
invert = plugin_of_a_test:Invert
plain = plugin_of_a_test:Invert
broken = plugin_of_a_test:Missing

[raypp.attacks]
gray = plugin_of_a_test:Gray
"""

REGISTRIES = (PROTECTIONS, raypp.attacks.ATTACKS)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with an installed package that adds methods; it is on the path."""
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    info = tmp_path / "plugin_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in REGISTRIES:
        vars(registry).pop("_entry_points", None)
    yield
    for registry in REGISTRIES:
        vars(registry).pop("_entry_points", None)


@pytest.mark.filterwarnings("ignore:package 'plugin-of-a-test' adds")
def test_an_installed_package_adds_methods(package: None) -> None:
    assert {"invert", "broken"} <= set(PROTECTIONS)
    options = load_config("quickstart", flags=["protection.name=invert", "protection.strength=0.5"]).protection
    assert options.model_dump() == {"name": "invert", "strength": 0.5}
    assert PROTECTIONS.get("plain").__module__ == "raypp.protections.plain", "a package replaces nothing"
    assert PROTECTIONS.build(options).options.strength == 0.5
    assert "plugin_of_a_test" in sys.modules
    assert raypp.attacks.ATTACKS.get("gray").Options().name == "gray"
    assert "Gray" in dir(raypp.attacks)
    with pytest.raises(ConfigError, match=r"^protection 'broken' of package 'plugin-of-a-test' cannot be loaded: Attr"):
        PROTECTIONS.get("broken")


def test_a_name_of_raypp_itself_is_left_out_with_a_warning(package: None) -> None:
    with pytest.warns(UserWarning, match="adds the protection 'plain', which is part of raypp; it is left out"):
        list(PROTECTIONS)


def test_a_decorated_class_is_a_method_of_this_process() -> None:
    @raypp.register_protection("mine")
    class Mine(raypp.Protection):
        """Leaves images as they are."""

        def forward(self, images: Any) -> Any:
            return images

    assert PROTECTIONS.get("mine") is Mine
    assert raypp.list_protections()["mine"] == "Leaves images as they are."
    assert load_config("quickstart", flags=["protection=mine"]).protection.model_dump() == {"name": "mine"}
    with pytest.raises(ConfigError, match=r"unknown key 'protection\.width'"):
        load_config("quickstart", flags=["protection.name=mine", "protection.width=3"])
    raypp.register_protection("mine")(Mine)  # a cell that runs twice


def test_a_name_that_cannot_be_registered_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^protection 'plain' is part of raypp; register yours under another name"):
        raypp.register_protection("plain")
    with pytest.raises(ConfigError, match=r"^attack 'inverse' is part of raypp"):
        raypp.register_attack("inverse")

    class Named(raypp.Protection):
        class Options(MethodConfig):
            name: Literal["other"] = "other"

    with pytest.raises(ConfigError, match=r"^protection 'mine': name in Named.Options is 'other'; allowed is name: "):
        raypp.register_protection("mine")(Named)


def test_the_decorators_import_no_torch() -> None:
    code = "import sys, raypp; raypp.register_protection; raypp.register_attack; raypp.attacks; raypp.metrics"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, timeout=60)
