"""The configuration tree: a preset, then a YAML file, then command-line flags, validated once.

Every number of the paper that a run uses stands in a preset, none in code. The merged tree is frozen, unknown keys are
refused, and it is written into each run and bundle.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from raypp.data import SOURCES
from raypp.models import ADAPTATIONS, BLOCK, CLASSIFIERS, FEATURES
from raypp.protections import PROTECTIONS
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import Location, Options, Registry, did_you_mean

REGISTRIES = {"source": SOURCES, "protection": PROTECTIONS, "classifier": CLASSIFIERS, "features": FEATURES}
"""Methods by the section that names one."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Side = Annotated[int, Field(ge=1)]


def _select(registry: Registry) -> BeforeValidator:
    """Validate a section against the options model that its ``name`` selects in ``registry``."""

    def validate(value: Any) -> Any:
        if isinstance(value, Options):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(f"a {registry.kind} needs a name; allowed: {', '.join(registry)}")
        try:
            model = registry.options(str(value["name"]))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return model.model_validate(value)

    return BeforeValidator(validate)


def _number(value: Any) -> Any:
    """A flag's text as the integer it is; a Literal does not convert by itself."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class Augment(Section):
    crop_padding: int = Field(4, ge=0, le=1024)
    """Pixels of zero padding before a random crop of the original size; 0 switches the crop off."""
    flip: bool = True
    """Mirror half of the images left to right."""


class Data(Section):
    source: Annotated[SerializeAsAny[Options], _select(SOURCES)]
    """Where images come from; ``raypp data ls`` lists the sources and their options."""
    image_size: tuple[Side, Side] | None = None
    """Height and width that every image is fitted to (resize, then centre crop); null takes them as they are."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_number)] = 3
    """3 for RGB, 1 for grey."""
    num_val: int = Field(5000, ge=1)
    """Images held out of the training split for validation, stratified by class."""
    num_train: int | None = Field(None, ge=1)
    """Use only this many training images (after the validation split), stratified by class; null uses all."""
    num_test: int | None = Field(None, ge=1)
    """Use only this many test images; null uses all."""
    augment: Augment = Augment()
    stream: bool = False
    """Stream training images through Ray Data instead of holding them in memory; needs Ray Train."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """Streaming only: images in each worker's local shuffle buffer."""


class Optimizer(Section):
    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """``muon`` (Jordan et al. 2024) makes what it adds to a weight of two and more dimensions orthogonal, and takes
    learning rates of ``adamw``'s size: more gained per image, and more to compute per step."""
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's and Muon's momentum; AdamW's first beta."""
    weight_decay: float = Field(5e-4, ge=0)


class Constant(Section):
    name: Literal["constant"] = "constant"


def scaled_milestones(milestones: Sequence[float], old_epochs: int, new_epochs: int) -> list[float]:
    """Milestones of a training of ``old_epochs`` at the same shares of one of ``new_epochs``."""
    return [_whole(round(milestone * new_epochs / old_epochs, 6)) for milestone in milestones]


def _whole(value: float) -> float:
    """A whole number as an integer, so that it is printed as one."""
    return int(value) if value == int(value) else value


PAPER_EPOCHS = 200  # of the default milestones
Milestone = Annotated[float, Field(ge=0), AfterValidator(_whole), PlainSerializer(_whole, return_type=Any)]


class MultiStep(Section):
    name: Literal["multistep"] = "multistep"
    milestones: tuple[Milestone, ...] = (60, 120, 160)
    """Epochs, counted from 0, after which the learning rate is multiplied by ``gamma``. They belong to the number of
    epochs that they are stated with: another number, and a phase of another length, keep their shares of the whole.
    The default is at 30, 60 and 80% of the epochs."""
    gamma: float = Field(0.2, gt=0, le=1)


class OneCycle(Section):
    name: Literal["one_cycle"] = "one_cycle"
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly to ``lr``; it then falls linearly to ``final``."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate after the last step, as a share of ``lr``."""


def _default_milestones(schedule: Any, info: ValidationInfo) -> Any:
    """Move milestones that nobody stated from the paper's number of epochs to the configured one."""
    epochs = info.data.get("epochs")
    if epochs is None or not isinstance(schedule, MultiStep) or "milestones" in schedule.model_fields_set:
        return schedule
    milestones = scaled_milestones(schedule.milestones, PAPER_EPOCHS, epochs)
    return MultiStep(milestones=tuple(milestones), gamma=schedule.gamma)


class Optimisation(Section):
    """How networks are trained: what every loop needs, the attacks' included."""

    epochs: int = Field(200, ge=1, le=1_000_000)
    """Epochs of the mode's own phase."""
    batch_size: int = Field(128, ge=2)
    """Images per step over all workers together."""
    eval_batch_size: int = Field(500, ge=1)
    """Images per evaluation step and worker."""
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[
        MultiStep | OneCycle | Constant,
        Field(discriminator="name", validate_default=True),
        AfterValidator(_default_milestones),
    ] = MultiStep()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto`` takes bf16 autocast where the hardware has bf16 instructions."""
    channels_last: bool = True
    compile: bool = False
    """torch.compile; measure before you switch it on."""
    sync_batchnorm: bool = False
    """Batch statistics over all workers, so that the number of workers does not change the result."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms."""
    adapt_threads: bool = True
    """CPU only: compute with fewer threads while other processes use the cores. Rounding depends on the number of
    threads; false keeps it, so that two runs end with the same bits."""
    checkpoint_seconds: float | None = Field(300, gt=0)
    """Write a checkpoint within an epoch as well when the last is so old; null writes them at the ends of epochs."""


class Train(Optimisation):
    mode: Literal["joint", "frozen", "plain"] = "joint"
    """``joint`` trains protection and classifier together. ``frozen`` trains the classifier on plain images first and
    then the protection alone, as the authors' released code does; the paper's Eq. 3, too, minimises over the
    protection's weights only. ``plain`` trains the classifier alone, the baseline."""
    alpha: float = Field(0.005, ge=0)
    """Weight of the feature distance in Eq. 4."""
    plain_epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Epochs of the plain classifier where a phase needs one first; null means ``epochs``."""


class Cluster(Section):
    num_workers: int | None = Field(None, ge=1)
    """Training workers; null takes one per GPU, else one per CPU, at most 8 and so that they divide the batch."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few workers as this when nodes leave, and take up more, to ``num_workers``, when they come; null
    waits for all of them. Where their number does not divide the batch, a step takes the next smaller one that it
    does."""
    resize_seconds: float = Field(30, ge=0)
    """Seconds between looks whether a run with ``min_workers`` can grow. To grow, it starts its workers again from the
    newest checkpoint."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves per worker; also its number of torch threads."""
    gpu: bool | None = None
    """One GPU per worker; null takes GPUs when the cluster has one for each worker at the start (true waits for
    them)."""
    max_failures: int = Field(3, ge=-1)
    """Times in all that a worker group is restarted from the last checkpoint before the run is given up; -1 sets no
    limit, which a long run on nodes that come and go wants."""
    storage: Location = Field("runs", validate_default=True)
    """Folder or pyarrow filesystem URI (s3://...) under which each run has its folder."""

    @model_validator(mode="after")
    def _range(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > (self.num_workers or 0):
            raise ValueError(
                f"min_workers is {self.min_workers}; allowed is at most num_workers, which is "
                f"{'not set' if self.num_workers is None else self.num_workers}"
            )
        return self


class Config(Section):
    """One run. Sections are frozen; make another with ``load_config`` or ``model_copy``."""

    seed: Seed = 0
    """Sets everything random: split, initial weights, batch order, augmentation."""
    data: Data
    protection: Annotated[SerializeAsAny[Options], _select(PROTECTIONS)]
    classifier: Annotated[SerializeAsAny[Options], _select(CLASSIFIERS)]
    adaptation: str = "auto"
    """Network between protected images and the classifier; ``auto`` is the one that the protection names."""
    features: Annotated[SerializeAsAny[Options], _select(FEATURES)]
    train: Train = Train()
    cluster: Cluster = Field(default_factory=Cluster)  # at each use: its storage is relative to the current folder

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.cluster.num_workers and self.train.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} cannot be divided among cluster.num_workers "
                f"{self.cluster.num_workers}; allowed is a multiple of it"
            )
        if self.cluster.num_workers and self.train.batch_size // self.cluster.num_workers < 2:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} leaves each of cluster.num_workers "
                f"{self.cluster.num_workers} one image; allowed are two and more, for batch normalisation"
            )
        if self.data.stream and self.cluster.min_workers is not None and not self.cluster.gpu:
            raise ValueError(
                "cluster.min_workers with data.stream needs cluster.gpu true: workers that take every CPU as it comes "
                "leave none for reading; allowed is a fixed cluster.num_workers"
            )
        if self.train.mode == "plain" and self.protection.name != "plain":
            raise ValueError(
                f"train.mode 'plain' trains no protection, found {self.protection.name!r}; allowed: 'plain'"
            )
        kind = PROTECTIONS.get(self.protection.name)
        if self.train.mode == "frozen" and not kind.trained:
            raise ValueError(
                f"train.mode 'frozen' trains the protection alone, and {self.protection.name!r} has nothing to train"
            )
        if (problem := kind.problem(self.protection, self.data.channels)) is not None:
            raise ValueError(problem)
        chosen = kind.adaptation if self.adaptation == "auto" else self.adaptation
        together = ADAPTATIONS.get(chosen).side if chosen in ADAPTATIONS else None
        block = getattr(self.protection, "block", BLOCK)
        if together == BLOCK and block != BLOCK:
            raise ValueError(
                f"protection.block {block} is not {BLOCK}, the side of the blocks that adaptation {chosen!r} "
                f"reads; allowed is {BLOCK}, or adaptation 'none'"
            )
        allowed = ("auto", "none", *ADAPTATIONS)
        if self.adaptation not in allowed:
            raise ValueError(
                f"unknown adaptation {self.adaptation!r}{did_you_mean(self.adaptation, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
        if self.train.mode == "frozen" and self.adaptation not in ("auto", "none"):
            raise ValueError(
                f"train.mode 'frozen' takes the plain classifier as it is, without adaptation {self.adaptation!r}"
            )
        return self

    @property
    def adaptation_name(self) -> str:
        """The adaptation network in front of the classifier; "auto" is the one that the protection names."""
        automatic: str = PROTECTIONS.get(self.protection.name).adaptation
        return automatic if self.adaptation == "auto" else self.adaptation

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


BESIDE = ("search",)
"""Sections of a preset that other commands read (``raypp tune``): no part of a run's configuration."""


def presets() -> dict[str, Path]:
    """Shipped presets by name."""
    folder = Path(str(resources.files("raypp") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(preset: str | Path, file: str | Path | None = None, flags: tuple[str, ...] | list[str] = ()) -> Config:
    """Merge a preset (by name, or a YAML path), an optional YAML file and flags ``--train.alpha 0.01``.

    Raises:
        ConfigError: one sentence that names the key, the value and what is allowed.
    """
    config = validate(load_tree(preset, file, flags))
    check_milestones(config.train, "train")
    return config


def load_tree(
    preset: str | Path, file: str | Path | None = None, flags: Sequence[str] = (), more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Merge as :func:`load_config` does, but do not validate; raises ConfigError for what cannot be read.

    Args:
        more: sections to keep, and to allow in flags, that are no part of a run's configuration.
    """
    known = presets()
    if str(preset) in known:
        tree = read_yaml(known[str(preset)])
    elif Path(preset).suffix in {".yaml", ".yml"}:
        tree = read_yaml(Path(preset))
    else:
        raise ConfigError(
            f"unknown preset {str(preset)!r}{did_you_mean(str(preset), known)}; "
            f"allowed: {', '.join(known)}, or the path of a .yaml file"
        )
    if file is not None:
        tree = merge(tree, read_yaml(Path(file)))
    tree = {key: value for key, value in tree.items() if key not in BESIDE or key in more}
    return merge(tree, parse_flags(flags, (*Config.model_fields, *more)))


def validate(tree: dict[str, Any]) -> Config:
    """Validate a merged tree; raises ConfigError with one sentence for the first thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, tree)) from None


def check_milestones(train: Optimisation, section: str) -> None:
    """Refuse milestones that training ends before; raises ConfigError.

    A check of what users write: stored configurations of earlier versions may hold such milestones.

    Args:
        section: where ``train`` stands, for the message.
    """
    if not isinstance(train.schedule, MultiStep):
        return
    late = [milestone for milestone in train.schedule.milestones if milestone >= train.epochs]
    if late:
        raise ConfigError(
            f"{section}.schedule.milestones is {list(train.schedule.milestones)}, but training ends after "
            f"{section}.epochs {train.epochs}; allowed are milestones less than {train.epochs}"
        )


def validate_data(tree: dict[str, Any]) -> Data:
    """Validate a ``data`` section by itself; raises ConfigError as :func:`validate` does."""
    try:
        return Data.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, {"data": tree}, ("data",))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a mapping; raises ConfigError with one sentence for what is wrong with it."""
    try:
        tree = load_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        what = "is no valid YAML" if error.syntax else "is not understood"
        raise ConfigError(f"config file {str(path)!r} {what}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; allowed is a mapping of sections")
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` overlaid by ``over``.

    A section whose ``name`` changes starts afresh, since other options apply. Milestones belong to the epochs that they
    are stated with: where ``over`` changes ``epochs`` and states no milestones, they keep their shares of the training.
    """
    return _merge(base, over, scale=True)


def _merge(base: dict[str, Any], over: dict[str, Any], *, scale: bool) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        # A bare name stands for {name: ...}, in whichever order a name and its options come.
        if isinstance(old, str) and isinstance(value, dict):
            old = {"name": old}
        if isinstance(old, dict) and isinstance(value, str):
            value = {"name": value}
        if isinstance(old, dict) and isinstance(value, dict):
            fresh = "name" in value and "name" in old and value["name"] != old["name"]
            merged[key] = value if fresh else _merge(old, value, scale=scale)
        else:
            merged[key] = value
    return _with_scaled_milestones(base, over, merged) if scale else merged


def _with_scaled_milestones(base: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """``merged`` with the milestones of ``base`` moved to the epochs of ``over``, where both are stated."""
    old, new, schedule, changes = base.get("epochs"), over.get("epochs"), merged.get("schedule"), over.get("schedule")
    if not isinstance(schedule, dict) or (isinstance(changes, dict) and "milestones" in changes):
        return merged
    try:
        milestones = scaled_milestones([float(m) for m in schedule["milestones"]], int(str(old)), int(str(new)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # nothing to scale, or what validation refuses
        return merged
    return merged | {"schedule": schedule | {"milestones": milestones}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"section.key": value}`` for every leaf of a tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


COMMAND_OPTIONS = ("name", "config", "resume", "local", "quiet", "storage")
"""Options of commands that take settings as well: a misspelt one arrives here."""


def parse_flags(flags: Sequence[str], roots: Iterable[str] | None = None) -> dict[str, Any]:
    """Turn ``--a.b value`` and ``--a.b=value`` into a tree; dashes in keys are read as underscores.

    Args:
        roots: what a key may begin with; by default a section of the configuration.

    Raises:
        ConfigError: a flag is not understood, or a setting is given twice.
    """
    known = list(Config.model_fields if roots is None else roots)
    tree: dict[str, Any] = {}
    settings: dict[tuple[str, ...], Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise ConfigError(f"unexpected argument {flag!r}; a setting is written --section.key VALUE")
        key, equals, text = flag[2:].partition("=")
        parts = key.replace("-", "_").split(".")
        if parts[0] not in known:
            raise ConfigError(
                f"unknown option --{key}{did_you_mean(parts[0], [*known, *COMMAND_OPTIONS])}; settings begin with "
                f"{', '.join(known)}"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
            text = rest.pop(0)
        try:
            value = _value(text)
        except DocumentError as error:
            raise ConfigError(f"--{key} is {text!r}: {error}") from error
        _add_settings(settings, tuple(parts), value)
        tree = _merge(tree, nest(parts, value), scale=False)  # all flags are stated together
    return tree


def _add_settings(settings: dict[tuple[str, ...], Any], path: tuple[str, ...], value: Any) -> None:
    """Add what a flag sets to what others set, by paths of keys; raises ConfigError for a setting that is there."""
    if isinstance(value, dict):
        for key, part in value.items():
            _add_settings(settings, (*path, *key.split(".")), part)
        return
    for earlier, earlier_value in settings.items():
        (outer, name), (inner, _) = sorted([(earlier, earlier_value), (path, value)], key=lambda pair: len(pair[0]))
        if inner[: len(outer)] != outer:
            continue
        # A bare name stands for {name: ...}, whose other keys may be given by themselves; null leaves a section out.
        if inner != outer and isinstance(name, str | None) and inner[len(outer)] != "name":
            continue
        raise ConfigError(
            f"{'.'.join(inner)} is given twice, first as {earlier_value}, then as {value}; allowed is once"
        )
    settings[path] = value


def _value(text: str) -> Any:
    """A flag's value: lists and mappings are YAML, ``null`` is none, all else is text that its setting converts."""
    if text == "null":
        return None
    if text.startswith(("[", "{")):
        try:
            return load_yaml(text)
        except DocumentError as error:
            if not error.syntax:
                raise
    return text


def nest(parts: Sequence[str], value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the parts a and b."""
    for part in reversed(parts):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def sentence(
    error: ValidationError, tree: dict[str, Any], within: tuple[str, ...] = (), root: type[BaseModel] | None = None
) -> str:
    """The first error as one sentence; pydantic's own wording, with the key spelled as the user wrote it.

    Args:
        within: the section that was validated by itself.
        root: the model that was validated; by default a :class:`Config`.
    """
    # An unknown key explains other errors (a missing required one, say), so it comes first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = [*within, *(str(part) for part in first["loc"])]
    # pydantic puts a discriminated union's tag into the path; the user never wrote it.
    if loc[:2] == ["train", "schedule"] and len(loc) > 2:
        del loc[2]
    key = ".".join(loc)
    if first["type"] == "extra_forbidden":
        siblings = _allowed_keys(loc[:-1], tree, root or Config)
        close = difflib.get_close_matches(loc[-1], siblings, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {key!r}{hint}; allowed there: {', '.join(siblings)}{_owners(loc, tree)}"
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    value = first["input"]
    shown = value if isinstance(value, str) and re.fullmatch(r"[-+.\d][-+.\deE]*", value) else repr(value)
    return f"{key} is {shown}: {reason[0].lower()}{reason[1:]}"


def _owners(loc: list[str], tree: dict[str, Any]) -> str:
    """Which methods have a key that the chosen one lacks; an empty string if none has it."""
    *above, key = loc
    registry = REGISTRIES.get(above[-1]) if above else None
    owners = [name for name in registry or () if registry and key in registry.options(name).model_fields]
    if not owners:
        return ""
    node: Any = tree
    for part in above:
        node = node.get(part, {}) if isinstance(node, dict) else {}
    name = node.get("name") if isinstance(node, dict) else node
    return f"; {'.'.join(above)} is {name!r}, and only {' or '.join(map(repr, owners))} has that key"


def _allowed_keys(loc: list[str], tree: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Keys allowed in the section at ``loc``, given what the user's tree selects there."""
    node: Any = tree
    for part in loc:
        node = node.get(part, {}) if isinstance(node, dict) else {}
        annotation = model.model_fields[part].annotation
        choices = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        name = node.get("name") if isinstance(node, dict) else None
        if Options in choices:
            model = REGISTRIES[part].options(str(name))
        else:
            named = [m for m in choices if "name" in m.model_fields and m.model_fields["name"].default == name]
            model = (named or choices)[0]
    return list(model.model_fields)
