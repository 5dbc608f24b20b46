"""Downloads a benchmark's questions from where its authors keep them, once, into the cache directory."""

import dataclasses
import hashlib
import http.client
import pathlib
import urllib.request

from specmq_jax.errors import UserError
from specmq_jax.files import cache_directory, written

_SECONDS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Questions as their authors publish them.

    Attributes:
      name: of the file in the cache directory.
      url: where they are.
      sha256: of the file; None where only its source vouches for it.
    """

    name: str
    url: str
    sha256: str | None = None

    def fetch(self) -> pathlib.Path:
        """The file in the cache directory, downloaded on first use.

        Raises:
          UserError: the source can't be reached, the file is not the expected one, or the cache can't be written to.
        """
        path = cache_directory() / "questions" / self.name
        if path.is_file():
            return path
        content = self._download()
        digest = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, digest):
            raise UserError(f"{self.url} is not the expected file: its SHA-256 is {digest}, expected {self.sha256}; give a "
                            "copy of your own with --question_file=FILE")
        with written(path, parents=True, advice="$SPECMQ_CACHE names another place") as partial:
            partial.write_bytes(content)
        return path

    def _download(self) -> bytes:
        try:
            with urllib.request.urlopen(self.url, timeout=_SECONDS) as response:
                return response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{self.url} can't be downloaded ({' '.join(str(reason).split())[:120]}); without a network, fetch "
                            "it elsewhere and name the file with --question_file=FILE") from None
