"""What every task of packing agrees on before it starts: a recipe, a folder, and the keys of the work between them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from shutil import rmtree

from tokenizers import Tokenizer

from pipeline.data import packed_dataset
from pipeline.data.chat import ChatTemplate
from pipeline.data.files import digest
from pipeline.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, PackingInputs, read_manifest
from pipeline.data.packing import PLANNER_VERSION
from pipeline.data.progress import ReportProgress, StageProgress
from pipeline.data.sources import (
    Unit,
    changed_ns,
    content_hash,
    fingerprint,
    resolve_source_path,
    unit_fingerprint,
    units,
)
from pipeline.data.token_ids import check_vocabulary
from pipeline.data.token_parts import TokenPart, TokenRecord
from pipeline.data.tokenizer import load_tokenizer, tokenizer_hash
from pipeline.errors import DataError
from pipeline.recipe.schema import DataRecipe, PackedSource, Recipe, RowSource, TrainTokenizer


@dataclass(frozen=True)
class Task:
    """Number `index` of `count` that share a stage."""

    index: int = 0
    count: int = 1

    def of(self, pieces: int) -> range:
        """Which of so many pieces of work are this task's."""
        return range(self.index, pieces, self.count)


WHOLE_STAGE = Task()


@dataclass(frozen=True, eq=False)
class PackJob:
    """A recipe, a folder, and what identifies the work between them."""

    recipe: Recipe
    output: Path
    vocab_limit: int | None
    """Token ids are below it; None is unknown."""
    tokenizer: Tokenizer | None
    """None where it is trained, and where every source is tokenized already."""
    chat: ChatTemplate | None
    """None where no source is a chat."""
    inputs: PackingInputs
    progress: ReportProgress | None

    @classmethod
    def of(
        cls, recipe: Recipe, *, output: Path, vocab_size: int | None = None, progress: ReportProgress | None = None
    ) -> "PackJob":
        """Loads the tokenizer and looks at the sources' files. Raises DataError where that cannot be done."""
        data = recipe.data
        name = data.tokenizer if isinstance(data.tokenizer, str) else None
        tokenizer = load_tokenizer(name, revision=data.tokenizer_revision) if name else None
        has_chats = any(isinstance(source, RowSource) and source.content == "chat" for source in data.sources)
        chat = ChatTemplate(name, revision=data.tokenizer_revision) if name and has_chats else None
        _check_same_tokenizer(data, tokenizer=tokenizer)
        inputs = PackingInputs(
            sources=tuple(fingerprint(source) for source in data.sources),
            tokenizer=_identity(data, tokenizer=tokenizer, chat=chat),
            separator=data.separator,
            seq_len=data.sample_tokens,
            packing=data.packing.model_dump(mode="json"),
            seed=data.seed,
            planner_version=PLANNER_VERSION,
        )
        limit = recipe.model.config.get("vocab_size") if vocab_size is None else vocab_size
        return cls(recipe, output, limit, tokenizer, chat, inputs, progress)

    @property
    def work(self) -> Path:
        return self.output / packed_dataset.WORK_NAME

    @cached_property
    def units(self) -> list[Unit]:
        return units(self.recipe.data.sources)

    @property
    def token_parts(self) -> list[TokenPart]:
        count = len(self.units)
        return [TokenPart(self.work, number, count, unit.files[0].path) for number, unit in enumerate(self.units)]

    @property
    def tokenizer_key(self) -> str:
        trained_on = self.inputs.sources if isinstance(self.recipe.data.tokenizer, TrainTokenizer) else ()
        return digest([FORMAT_VERSION, self.inputs.tokenizer, trained_on])

    @cached_property
    def tokens_keys(self) -> list[str]:
        """Of each unit. Tokens do not depend on the sample's length or on weights: new ones tokenize nothing again."""
        sources = self.recipe.data.sources
        return [
            digest([self.tokenizer_key, self.inputs.separator, unit_fingerprint(unit, source=sources[unit.source])])
            for unit in self.units
        ]

    @property
    def plan_key(self) -> str:
        return digest([FORMAT_VERSION, asdict(self.inputs)])

    def stage_progress(self, stage: str, bytes_total: int) -> StageProgress:
        return StageProgress(self.progress, stage=stage, bytes_total=bytes_total)

    def reusable(self) -> Manifest | None:
        """The manifest of the finished data set that this job would make, if it is there.

        Raises DataError if the one that is there was made from other inputs, or does not fit the model.
        """
        manifest = read_manifest(self.output)
        if manifest is None:
            return None
        found, asked = asdict(manifest.inputs), asdict(self.inputs)
        differences = [f"{key} {found[key]}, asked for {asked[key]}" for key in asked if found[key] != asked[key]]
        differences += [] if differences else self._changed(manifest)
        if differences:
            raise DataError(
                f"{self.output} holds a data set of other inputs ({'; '.join(differences)}); it is not overwritten: "
                "choose another --output, or delete it"
            )
        check_vocabulary(manifest.max_token_id, limit=self.vocab_limit, where=self.output)
        return manifest

    def _changed(self, manifest: Manifest) -> list[str]:
        """Files that were edited since they were packed; only those newer than the manifest are read."""
        packed_ns = (self.output / MANIFEST_NAME).stat().st_mtime_ns
        return [
            f"{unit.files[0].path} has changed since"
            for unit, content in zip(self.units, manifest.contents, strict=True)
            if changed_ns(unit) > packed_ns and content_hash(unit) != content
        ]

    def claim(self) -> None:
        """Makes the output folder ours. Raises DataError if it holds anything else, for finish removes files in it.

        Other tasks may do so at the same time, and even finish: their work folder comes first and goes last, so the
        listing is taken before the look at the folder, and that before the look at the manifest.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        holds_files = any(entry != self.work for entry in self.output.iterdir())
        if holds_files and not self.work.exists() and read_manifest(self.output) is None:
            raise DataError(f"{self.output} is not empty and holds no packed data set; choose another --output")
        self.work.mkdir(exist_ok=True)

    def remove_work(self) -> None:
        """Whatever another task still holds open there goes with the next call."""
        rmtree(self.work, ignore_errors=True)

    def tokens_records(self) -> list[TokenRecord]:
        """Of every token part. Raises DataError if one is not made yet."""
        found = [
            part.record(key=key, unit=unit)
            for part, key, unit in zip(self.token_parts, self.tokens_keys, self.units, strict=True)
        ]
        missing = found.count(None)
        if missing:
            raise DataError(
                f"{self.output} lacks the tokens of {missing} of {len(found)} parts of these sources; run the stage "
                "tokenize first"
            )
        return [record for record in found if record is not None]


def _identity(data: DataRecipe, *, tokenizer: Tokenizer | None, chat: ChatTemplate | None) -> str | None:
    """What decides the tokens of a text."""
    if isinstance(data.tokenizer, TrainTokenizer):
        return f"trained: vocab_size {data.tokenizer.vocab_size}, sample_mib {data.tokenizer.sample_mib}"
    if tokenizer is None:
        return None
    template = f", chat template {digest(chat.template)}" if chat else ""
    return f"sha256:{tokenizer_hash(tokenizer)}{template}"


def _check_same_tokenizer(data: DataRecipe, *, tokenizer: Tokenizer | None) -> None:
    """Raises DataError if packed sources were made with different tokenizers, or with another than the recipe's."""
    made_with = {
        f"data source {source.path}": manifest.tokenizer_hash
        for source in _packed_sources(data)
        if (manifest := read_manifest(resolve_source_path(source.path))) and manifest.tokenizer_hash
    }
    if tokenizer is not None:
        made_with["data.tokenizer"] = tokenizer_hash(tokenizer)
    elif isinstance(data.tokenizer, TrainTokenizer) and made_with:
        made_with["data.tokenizer"] = "one to be trained"
    if len(set(made_with.values())) > 1:
        told = ", ".join(f"{what}: {hash[:12]}" for what, hash in made_with.items())
        raise DataError(
            f"tokens of different tokenizers cannot be mixed ({told}); set data.tokenizer to the one of all"
        )


def _packed_sources(data: DataRecipe) -> Sequence[PackedSource]:
    return [source for source in data.sources if isinstance(source, PackedSource)]
