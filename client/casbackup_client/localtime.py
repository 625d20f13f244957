"""The time zone in which retention rules count days: that of this machine, or of the variable TZ."""

from __future__ import annotations

import calendar
import time
from datetime import datetime, timedelta, tzinfo


class LocalZone(tzinfo):
    """What the C library knows of local time, at any time: a day of 23 or 25 hours is one day.

    ``datetime.astimezone`` would fix today's distance to UTC for all dates, and ``zoneinfo`` need not know
    every TZ.
    """

    def fromutc(self, moment: datetime) -> datetime:
        local = time.localtime(calendar.timegm(moment.timetuple()))
        return datetime(*local[:6], moment.microsecond, tzinfo=self)

    def utcoffset(self, moment: datetime | None) -> timedelta | None:
        if moment is None:
            return None
        seconds = calendar.timegm(moment.timetuple())
        return timedelta(seconds=seconds - int(time.mktime((*moment.timetuple()[:8], -1))))

    def dst(self, moment: datetime | None) -> timedelta | None:
        return None

    def tzname(self, moment: datetime | None) -> str | None:
        return None
