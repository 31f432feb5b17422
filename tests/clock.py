"""A clock that tests move: the database's, which everything is timed by, and a sender's own."""

import datetime as dt

from sqlalchemy import URL, create_engine, text


class Clock:
    """Shadows now() for sessions of one database that are opened afterwards.

    Defaults of columns keep the real one: they were bound when the tables were made.
    """

    def __init__(self, url: URL) -> None:
        self._owner = create_engine(url)
        self._at_s = 0.0
        statements = (
            "CREATE SCHEMA simulated",
            "CREATE TABLE simulated.clock AS SELECT interval '0' AS ahead",
            "CREATE FUNCTION simulated.now() RETURNS timestamptz LANGUAGE sql STABLE AS"
            " 'SELECT pg_catalog.now() + ahead FROM simulated.clock'",
            "GRANT USAGE ON SCHEMA simulated TO PUBLIC",
            "GRANT SELECT ON simulated.clock TO PUBLIC",
            f'ALTER DATABASE "{url.database}" SET search_path = simulated, pg_catalog, public',
        )
        with self._owner.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def advance(self, seconds: float) -> None:
        self._at_s += seconds
        with self._owner.begin() as connection:
            ahead = {"ahead": dt.timedelta(seconds=self._at_s)}
            connection.execute(text("UPDATE simulated.clock SET ahead = :ahead"), ahead)

    def monotonic(self) -> float:
        """As time.monotonic()."""
        return 1e6 + self._at_s

    def close(self) -> None:
        self._owner.dispose()
