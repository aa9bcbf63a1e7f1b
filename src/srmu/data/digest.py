"""Keyed digests of texts: they say whether two sets are the same, and nothing of their words."""

import hmac
import os
from collections.abc import Iterable
from contextlib import suppress

from srmu.engine.files import cache_dir

PROCESS_KEY = os.urandom(32)


def own_key() -> bytes:
    """This user's secret of 32 bytes, drawn on first use; processes that race get the same."""
    path = cache_dir() / "key"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".key.{os.getpid()}")
            fresh.write_bytes(os.urandom(32))
            fresh.chmod(0o600)
            with suppress(FileExistsError):  # another process was faster: its key holds
                os.link(fresh, path)
            fresh.unlink()
        return path.read_bytes()
    except OSError:
        return PROCESS_KEY  # which lasts as long as the process


def digest_texts(texts: Iterable[str]) -> str:
    """A keyed digest of the texts: it tells data sets apart here, and says nothing elsewhere."""
    code = hmac.new(own_key(), digestmod="sha256")
    for text in texts:
        code.update(text.encode() + b"\0")
    return code.hexdigest()
