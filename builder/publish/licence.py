"""The licence of a dataset: the strictest of the normal photographs', or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from builder.errors import BuilderError


class Licence(NamedTuple):
    """A licence under which adaptations may be published, and what it asks of them."""

    spdx: str
    url: str
    attribution: bool = True
    non_commercial: bool = False
    share_alike: bool = False


def _cc(kind: str, version: str) -> Licence:
    return Licence(
        f"CC-{kind}-{version}",
        f"https://creativecommons.org/licenses/{kind.lower()}/{version}/",
        non_commercial="NC" in kind,
        share_alike="SA" in kind,
    )


_CC_VERSIONS = ("2.0", "2.5", "3.0", "4.0")
# From the freest to the strictest; an adaptation of several takes the last one that occurs.
LICENCES = (
    Licence("CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/", attribution=False),
    Licence("PDDL-1.0", "https://opendatacommons.org/licenses/pddl/1-0/", attribution=False),
    Licence("CDLA-Permissive-2.0", "https://cdla.dev/permissive-2-0/"),
    Licence("MIT", "https://spdx.org/licenses/MIT.html"),
    Licence("BSD-2-Clause", "https://spdx.org/licenses/BSD-2-Clause.html"),
    Licence("BSD-3-Clause", "https://spdx.org/licenses/BSD-3-Clause.html"),
    Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    Licence("ODC-By-1.0", "https://opendatacommons.org/licenses/by/1-0/"),
    *(_cc("BY", version) for version in _CC_VERSIONS),
    *(_cc("BY-SA", version) for version in _CC_VERSIONS),
    *(_cc("BY-NC", version) for version in _CC_VERSIONS),
    *(_cc("BY-NC-SA", version) for version in _CC_VERSIONS),
)
UNKNOWN = Licence("unknown", "")

_BY_NAME = {licence.spdx.lower(): licence for licence in LICENCES}
# What the Hugging Face hub calls them; any other is `other` with its name and link.
_HUB = {"cc0-1.0", "pddl", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "odc-by"} | {
    f"cc-{kind}-{version}"
    for kind in ("by", "by-sa", "by-nc", "by-nc-sa")
    for version in _CC_VERSIONS
}
_HUB_NAME = {
    "PDDL-1.0": "pddl",
    "ODC-By-1.0": "odc-by",
    "CDLA-Permissive-2.0": "cdla-permissive-2.0",
}


def parse_licence(text: str) -> Licence | None:
    """The licence that a text such as `CC BY-NC-SA 4.0` or `CC-BY-4.0` names; None if unlisted."""
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    return _BY_NAME.get({"cc0": "cc0-1.0", "cc-0-1.0": "cc0-1.0"}.get(name, name))


def roll_up(sources: Mapping[str, str], *, i_know: bool = False) -> Licence:
    """The licence of what is made from all sources (`{source: its licence}`): the strictest one.

    Raises BuilderError for a licence that forbids adaptations, for two that no one licence can
    serve, and, unless `i_know`, for an unknown one; with `i_know` such a dataset is `unknown`.
    """
    found: dict[str, Licence] = {}
    unknown = False
    for source, text in sources.items():
        licence = parse_licence(text)
        if re.search(r"\bND\b", text.upper()):
            raise BuilderError(
                f"{source}: licence {text!r} forbids publishing adaptations, and a painted image "
                "is one; build without this source"
            )
        if licence is not None:
            found[source] = licence
        elif i_know:
            unknown = True
        else:
            raise BuilderError(
                f"{source}: licence {text!r} is not one whose terms are known here (SPDX names "
                "such as CC-BY-4.0); build with --licence once you know it, or take the "
                "responsibility with --i-know"
            )
    strictest = max(found.values(), key=LICENCES.index, default=UNKNOWN)
    for source, licence in found.items():
        if not _may_become(licence, strictest):
            other = next(name for name, one in found.items() if one == strictest)
            raise BuilderError(
                f"{source} is {licence.spdx} and {other} is {strictest.spdx}: no one licence "
                "allows both; build a dataset from each"
            )
    return UNKNOWN if unknown else strictest


def _may_become(licence: Licence, strictest: Licence) -> bool:
    """Whether an adaptation of `licence`'s work may be published under `strictest`."""
    if not licence.share_alike:
        return True
    kind, strict_kind = licence.spdx.rsplit("-", 1)[0], strictest.spdx.rsplit("-", 1)[0]
    return kind == strict_kind  # the same licence, in this or a later version


def hub_licence(licence: Licence) -> list[tuple[str, str]]:
    """The keys of a dataset card that state the licence: (key, value) in order."""
    if licence == UNKNOWN:
        return [("license", "unknown")]
    name = _HUB_NAME.get(licence.spdx, licence.spdx.lower())
    if name in _HUB:
        return [("license", name)]
    return [("license", "other"), ("license_name", name), ("license_link", licence.url)]
