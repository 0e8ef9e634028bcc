"""The options of ``mbq-gguf convert``, and values derived from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from mbq_gguf import settings as defaults
from mbq_gguf.calibration.dataset import Turns
from mbq_gguf.calibration.magnitudes import Estimator
from mbq_gguf.calibration.token_weights import Kind
from mbq_gguf.code_hash import code_hash
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.formats.row_scale import ROW_SCALES
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.prompts import AnswerMask
from mbq_gguf.models.tower import Tower
from mbq_gguf.quantise_tower import TowerSettings
from mbq_gguf.settings import Activations, Method, QuantiseSettings, Rounding, SearchLoss
from mbq_gguf.transforms.rotation import Rotate, widest_rotation

REFERENCE_TYPES = ("BF16", "F16", "F32")  # values of --type without quantisation, as upstream's converter would write


@dataclass(frozen=True)
class ConvertOptions:
    """The options of ``mbq-gguf convert`` with their defaults."""

    model_dir: Path
    out: Path
    type: str = QuantiseSettings.type_name
    target_bpw: float | None = None  # choose a type for each tensor, up to this many bits per weight over the decoder's matrices
    method: Method = QuantiseSettings.method
    rounding: Rounding = QuantiseSettings.rounding
    calib: Path | None = None  # a JSONL file or a folder of images; None: the included set
    samples: int = defaults.SAMPLES
    seed: int = defaults.SEED
    turns: Turns = defaults.TURNS
    device: str = defaults.DEVICE
    threads: int | None = None
    memory: float | None = None  # GB of host memory to use before activations spill to disk; None: FREE_SHARE of what is free
    embedding_type: str = defaults.EMBEDDING_TYPE  # type of embeddings and output head
    mmproj_type: str = defaults.MMPROJ_TYPE
    synthetic: int = QuantiseSettings.synthetic
    floor: bool = QuantiseSettings.floor  # raise layers' ratios to at least the median over layers
    answer_mask: AnswerMask = QuantiseSettings.answer_mask
    token_weights: Kind = QuantiseSettings.token_weights
    prompt_weight: float = QuantiseSettings.prompt_weight
    activations: Activations = QuantiseSettings.activations
    range_estimator: Estimator = QuantiseSettings.range_estimator
    rotate: Rotate | None = None  # None: as far as the model allows for ROTATED_TYPES, else none
    rotate_tower: bool | None = None  # None: if mmproj_type is one of ROTATED_TYPES and the tower allows it
    mmproj_activations: Activations | None = None  # None: static if GPTQ quantises the tower
    search_samples: int | None = QuantiseSettings.search_samples
    search_loss: SearchLoss | None = QuantiseSettings.search_loss
    grouped_o: bool = QuantiseSettings.grouped_o
    clip: bool = QuantiseSettings.clip
    propagate_error: bool = QuantiseSettings.propagate_error
    error_correction: float = QuantiseSettings.error_correction
    refits: int = QuantiseSettings.refits
    learn_scales: int = QuantiseSettings.learn_scales
    language_model_only: bool = False  # no vision file; calibrate on texts only
    trust_remote_code: bool = False  # whether Python code in model_dir may run
    work_dir: Path | None = None  # where finished layers are kept; None: beside out, until out is whole

    @property
    def mmproj(self) -> Path:
        """The second file: vision tower and projector."""
        return self.out.with_name(f"mmproj-{self.out.name}")

    @property
    def settings(self) -> QuantiseSettings:
        """The settings for the converter's core."""
        shared = {field.name for field in fields(QuantiseSettings)} & {field.name for field in fields(self)}
        chosen = {name: getattr(self, name) for name in shared} | {"rotate": self.rotate or QuantiseSettings.rotate}
        chosen["pictures"] = not self.language_model_only
        return QuantiseSettings(type_name=quant_type(self.type).name, **chosen)

    def with_rotation(self, loaded: LoadedModel) -> ConvertOptions:
        """These options with a default for ``rotate`` that suits type and model."""
        if self.rotate is not None:
            return self
        gains = quant_type(self.type).name in defaults.ROTATED_TYPES and self.rounding == "gptq" and self.method == "rtn"
        return replace(self, rotate=widest_rotation(loaded) if gains and not self.target_bpw else "none")

    @property
    def work_root(self) -> Path:
        """The default folder for the finished layers of runs that write ``out``."""
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def model_state(self) -> str:
        """A digest of the names, sizes and times of the model's files, since hashing the weights would take minutes.

        Ignores files that conversions may write there: GGUF files, their locks and temporary files, a model card.
        """
        files = [path for path in sorted(self.model_dir.iterdir()) if path.is_file() and path.suffix not in (".gguf", ".md")]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if not path.name.startswith(".")]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    @property
    def fingerprints(self) -> dict[str, str]:
        """What finished layers depend on besides the samples, by name."""
        return {
            "model": self.model_state,
            "settings": json.dumps(asdict(self.settings), sort_keys=True),
            "code": code_hash("quantise"),
        }

    @property
    def calibrates(self) -> bool:
        """Whether calibration samples are needed."""
        return bool(self.target_bpw or self.method != "rtn" or self.rounding != "nearest" or self.activations == "static")

    @property
    def tower_type(self) -> str | None:
        """The type with one scale per row for the tower's matrices, or None."""
        return self.mmproj_type if self.mmproj_type in ROW_SCALES else None

    @property
    def changes_tower(self) -> bool:
        """Whether the vision file has other weights than the checkpoint."""
        return self.tower_type is not None or bool(self.rotate_tower)

    def rotates_tower(self, tower: Tower) -> bool:
        """Whether ``tower`` is rotated."""
        return self.tower_type in defaults.ROTATED_TYPES and tower.no_rotation() is None if self.rotate_tower is None else self.rotate_tower

    @property
    def tower_activations(self) -> Activations:
        """Whether the activations of the tower's blocks have static or dynamic ranges."""
        measured: Activations = "static" if self.tower_type and self.rounding == "gptq" else "dynamic"
        return self.mmproj_activations or measured

    def tower_settings(self, tower: Tower) -> TowerSettings:
        """The settings for quantising ``tower``."""
        made, settings = self.synthetic // 2, self.settings
        return TowerSettings(
            self.tower_type, self.rotates_tower(tower), made, settings.damping, settings.refits, activations=self.tower_activations
        )

    @property
    def unquantised(self) -> bool:
        """Whether the text file is written without quantisation, as by upstream's converter."""
        return self.target_bpw is None and quant_type(self.type).name in REFERENCE_TYPES
