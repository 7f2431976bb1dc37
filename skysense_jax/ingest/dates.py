"""Which dates a user wants: years, months, days, times and ranges of them, the same for all kinds of sources.

Next: stac.py, cubes.py.
"""

import dataclasses
import datetime
import re


@dataclasses.dataclass(frozen=True)
class Interval:
    """A time from ``begin`` to before ``end``; None: from or to whenever."""

    begin: datetime.datetime | None = None
    end: datetime.datetime | None = None

    def meets(self, first: datetime.datetime, last: datetime.datetime) -> bool:
        """Whether some of the time from ``first`` to ``last`` lies in it."""
        return (self.begin is None or last >= self.begin) and (self.end is None or first < self.end)

    def meets_day(self, day: int) -> bool:
        """Whether some of a day, counted from 1970-01-01, lies in it."""
        begin = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day)
        return self.meets(begin, begin + datetime.timedelta(days=1, microseconds=-1))

    def asked(self) -> str | None:
        """As an API is asked for it, in whole seconds; None: no bound."""
        if self.begin is None and self.end is None:
            return None
        last = self.end and self.end - datetime.timedelta(seconds=1)
        return "/".join(f"{utc(time):%Y-%m-%dT%H:%M:%SZ}" if time else ".." for time in (self.begin, last))


_WITHIN = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?")


def interval(text: str) -> Interval:
    """The time that a text says: a year, a month, a day or a time of RFC 3339, or two with / between.

    An end of a range that is ".." or empty is open.

    Raises:
      ValueError: the text says none.
    """
    parts = text.split("/")
    spans = [Interval() if len(parts) == 2 and part in ("", "..") else _span(part) for part in parts]
    found = Interval(spans[0].begin, spans[-1].end)
    if len(parts) > 2 or found == Interval() or (found.begin and found.end and found.begin >= found.end):
        raise ValueError(f"{text!r} is no time, or one that ends before it begins")
    return found


def _span(text: str) -> Interval:
    """From the first to behind the last second of a year, month, day or second."""
    match = _WITHIN.fullmatch(text)
    if match is None:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d[Tt ].*", text):
            raise ValueError(f"{text!r} is no year, month, day or time")
        begin = utc(datetime.datetime.fromisoformat(text.upper())).replace(microsecond=0)
        return Interval(begin, begin + datetime.timedelta(seconds=1))
    year, month, day = (int(part) if part else None for part in match.groups())
    begin = datetime.datetime(year, month or 1, day or 1, tzinfo=datetime.UTC)
    if day:
        return Interval(begin, begin + datetime.timedelta(days=1))
    after = (year, month + 1) if month and month < 12 else (year + 1, 1)
    return Interval(begin, datetime.datetime(*after, 1, tzinfo=datetime.UTC))


def utc(time: datetime.datetime) -> datetime.datetime:
    """A time in UTC, which one without a zone is taken to be."""
    return time.astimezone(datetime.UTC) if time.tzinfo else time.replace(tzinfo=datetime.UTC)
