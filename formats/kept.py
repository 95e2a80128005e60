"""Embeddings of a corpus kept on disk, and the digest that names them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.datasets import RetrievalDataset
from model import Embedder, lora_layers
from support.files import InputError, write_atomic

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fingerprint(embedder: Embedder) -> str:
    """A digest of what decides the embeddings beside `Embedder.describe`: weights, sizes, tokenizer, the
    adapters' strength."""
    digest = hashlib.blake2b(
        f"{embedder.decoder.config}{embedder.tokenizer.to_str()}".encode(), digest_size=16
    )
    digest.update(repr([layer.scaling for layer in lora_layers(embedder.decoder).values()]).encode())
    for name, tensor in sorted(embedder.decoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class EmbeddingStore:
    """Embeddings of a corpus on disk: a file a block, written whole or not at all, memory-mapped when read.

    A store belongs to one corpus, one model and one way of embedding: the folder's name is a digest of all of
    that, so nothing stale is ever read, and an encoding that was interrupted goes on where it stopped. Raises
    InputError where the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Embedder,
        dataset: RetrievalDataset,
        dtype: torch.dtype,
        digest: str | None = None,  # `fingerprint`'s, where it is known: it takes reading all weights
    ):
        how = {**embedder.describe(), "model": digest or fingerprint(embedder), "stored_as": str(dtype)}
        key = json.dumps(how | {"corpus": dataset.documents.fingerprint}, sort_keys=True)
        self.folder = folder / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        self.dtype, self.dim = dtype, embedder.dim
        self.folder.mkdir(parents=True, exist_ok=True)
        have = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        need, free = dataset.num_documents * self.dim * dtype.itemsize, shutil.disk_usage(self.folder).free
        if need - have > free:
            raise InputError(f"{folder}: {need / 1e9:.1f} GB of embeddings, {free / 1e9:.1f} GB free")
        write_atomic(self.folder / "key.json", key + "\n")

    def _path(self, start: int, end: int) -> Path:
        return self.folder / f"{start:010d}-{end:010d}.safetensors"

    def holds(self, start: int, end: int) -> bool:
        return self._path(start, end).exists()

    def read(self, start: int, end: int) -> Tensor:
        """(end - start, C), a view of the file."""
        path = self._path(start, end)
        try:
            return load_file(path)["embeddings"]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{path}: not a whole file of embeddings ({error}); delete it") from error

    def write(self, start: int, end: int, embeddings: Tensor) -> Tensor:
        """Keep a block; returns it as it will be read, (end - start, C)."""
        path = self._path(start, end)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        embeddings = embeddings.to("cpu", self.dtype)
        save_file({"embeddings": embeddings}, temporary)
        os.replace(temporary, path)
        return embeddings
