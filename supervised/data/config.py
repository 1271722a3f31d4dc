"""What can be set of the data. Imports nothing heavy."""

from dataclasses import dataclass, field

from lab.config import require

FORMATS = ("auto", "idx", "image_folder", "npz", "text", "aligned", "rows")
BAD_ROWS = ("error", "skip")


def require_at_most(config: object, group: str, **most: float) -> None:
    """Raises `ConfigError` for the first key of a group that is above what anybody can mean, e.g. 1e30."""
    for key, bound in most.items():
        value = getattr(config, key)
        name = f"{group}.{key}" if group else key
        require(value is None or value <= bound, name, f"{value} must be at most {bound:,}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done at random to images that are learned from. Held-out ones stay as they are."""

    shift: int = 0
    """Pixels an image may move in each direction; what comes in from outside is the mean colour."""
    flip: bool = False
    """Mirror every other image left to right."""
    cutout: int = 0
    """Side of a square that is wiped out (arXiv 1708.04552), pixels; 0: none."""
    mixup: float = 0.0
    """alpha of Beta(alpha, alpha), by which two images and their labels are mixed (arXiv 1710.09412)."""
    cutmix: float = 0.0
    """Likewise, but a rectangle of one image is put into the other (arXiv 1905.04899)."""

    def __post_init__(self) -> None:
        for key in ("shift", "cutout", "mixup", "cutmix"):
            require(getattr(self, key) >= 0, f"data.augment.{key}", "must not be negative")
        require_at_most(self, "data.augment", shift=4096, cutout=65_536, mixup=1e6, cutmix=1e6)
        require(not (self.mixup and self.cutmix), "data.augment.cutmix", "cannot be used together with mixup")

    @property
    def any(self) -> bool:
        """Whether anything is done at all."""
        return self != AugmentConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from."""

    source: str
    """One of `lab list datasets`, a file, a folder, or hub:OWNER/NAME[#CONFIG]."""
    format: str = "auto"
    """Of a file or folder: idx, image_folder, npz (also .npy), text, aligned (a language a file), rows
    (JSONL, JSON, CSV, TSV or Parquet: texts, pairs, tasks, tables, or what pictures beside them show)."""
    label: list[str] | str | int | None = None
    """Of a table, the column that is learned: its name, or its number (0: the first, -1: the last), or a list
    of columns, one a class or one a number to predict; of an .npz the array. null: the one called label,
    target, class or y, or those whose names so begin (label_cat, label_dog)."""
    header: bool | None = None
    """Whether the first line of CSV names the columns; null: as it looks."""
    drop: list[str] = field(default_factory=list)
    """Columns of a table that are left out."""
    bad_rows: str = "error"
    """What becomes of a table's rows that lack a value, and of pictures that cannot be opened: error, or skip
    to leave them out."""
    evaluate_on: str = ""
    """The part that is evaluated on in training and chooses the best weights, e.g. validation, or held_out
    for a share of the training part; empty: validation where there is one, else test, else held_out."""
    held_out: float = 0.2
    """Share kept for evaluation where the source has no such part: of each class, of documents, of a text's
    end, of the last stretches of play."""
    split_seed: int = 0
    """Another seed holds out others."""
    limit: int | None = None
    """Samples of each part at most (of text: characters, of play: steps); null: all."""
    img_size: int | None = None
    """Side of the square that images from files are scaled and cropped to; of patches of photographs."""
    grayscale: bool = False
    """One channel instead of three, of images from files."""
    suffix: str = ".txt"
    """Of the files in a folder of text."""
    pair: list[str] = field(default_factory=lambda: ["source", "target"])
    """From what to what to translate: two keys of each row, or suffixes of aligned files, e.g. [de, en]."""
    tokenizer: str = "bytes"
    """Of text: bytes, bpe (trained on the training part), or a folder or Hub name of a pretrained one."""
    vocab_size: int = 8192
    """Tokens of bpe, special ones included."""
    context: int = 256
    """Tokens a language model sees; longer pairs are left out of training, longer task texts are cut."""
    batch_tokens: int = 0
    """Tokens of a batch of pairs, padding included, on either side; 0: a batch has `batch_size` pairs."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require(bool(self.source), "data.source", "must name a data set")
        require(self.format in FORMATS, "data.format", f"{self.format!r} is none of {', '.join(FORMATS)}")
        require(
            self.bad_rows in BAD_ROWS, "data.bad_rows", f"{self.bad_rows!r} is none of {', '.join(BAD_ROWS)}"
        )
        require(0 < self.held_out < 1, "data.held_out", f"{self.held_out} must lie between 0 and 1")
        require(0 <= self.split_seed < 2**31, "data.split_seed", "must be between 0 and 2^31 - 1")
        require(self.limit is None or self.limit >= 2, "data.limit", "must be at least 2, or null")
        require(self.img_size is None or self.img_size >= 1, "data.img_size", "must be at least 1, or null")
        require(
            len(self.pair) == 2 and self.pair[0] != self.pair[1],
            "data.pair",
            f"{self.pair} must be two different names, e.g. [de, en]",
        )
        require(self.vocab_size >= 300, "data.vocab_size", "must be at least 300: all bytes, and some more")
        require(self.context >= 1, "data.context", "must be at least 1")
        require(self.batch_tokens >= 0, "data.batch_tokens", "must be 0 (use batch_size) or more")
        require(
            self.label is None or not isinstance(self.label, bool),
            "data.label",
            f"{self.label} must be the name or the number of a column",
        )
        require(
            not isinstance(self.label, list) or len({*self.label}) == len(self.label) > 1,
            "data.label",
            f"{self.label} must be two different columns or more; name one without brackets",
        )
        require_at_most(
            self,
            "data",
            limit=10**15,
            img_size=2**20,
            vocab_size=10**7,
            context=10**7,
            batch_tokens=10**9,
        )
