"""Documents by language: py3langid, naive Bayes over byte n-grams with its model in the package, works offline.

(Lui and Baldwin, "langid.py: An Off-the-shelf Language Identification Tool", ACL 2012.)
"""

from types import ModuleType

from hydra_scale.errors import ConfigError, EnvironmentFault

_CHARACTERS = 4000


class LanguageFilter:
    """Drops documents that are not in a language, judged by their first 4,000 characters.

    Args:
        language: ISO 639 code, as `en`.
        confidence: least probability of it; no other language that the model knows may be likelier.

    Raises:
        ConfigError: the model does not know the language.
        EnvironmentFault: py3langid is not installed.
    """

    def __init__(self, language: str, confidence: float) -> None:
        langid = _langid()
        self._identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        if language not in self._identifier.labels:
            known = ", ".join(sorted(self._identifier.labels))
            raise ConfigError(f"--language: found {language!r}, expected one of {known}; choose one of these codes")
        self._language, self._confidence = language, confidence

    def __call__(self, text: str) -> str | None:
        """`language` if the document is to be dropped."""
        found, confidence = self._identifier.classify(text[:_CHARACTERS])
        return None if found == self._language and confidence >= self._confidence else "language"


def _langid() -> ModuleType:
    """The one place that needs py3langid."""
    try:
        from py3langid import langid
    except ImportError:
        raise EnvironmentFault("--language needs py3langid; pip install 'hydra-scale[filters]'") from None
    return langid
