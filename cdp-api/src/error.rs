//! The error of [`crate::point_spec`].

/// Why a text is no point in time. The message says what would be one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PointSpecError {
    /// Nothing was given, or more than [`crate::limits::MAX_POINT_BYTES`].
    #[error("a point in time is 1 to {max} bytes long", max = crate::limits::MAX_POINT_BYTES)]
    Length,
    /// After `lsn:` comes something other than a number.
    #[error("'{0}': after 'lsn:' comes a whole number, such as lsn:1042")]
    Lsn(String),
    /// After `bookmark:` comes no name, or too long a one.
    #[error("'{0}': after 'bookmark:' comes a name of 1 to {max} bytes", max = crate::limits::MAX_BOOKMARK_BYTES)]
    Bookmark(String),
    /// None of the forms.
    #[error(
        "'{0}' is no point in time; give lsn:N, bookmark:NAME, latest, a time such as 2026-11-20T10:00:03Z, \
         '2026-11-20 10:00:03' or 10:00:03 (local), or how long ago, such as -5m or '5 minutes ago'"
    )]
    Unknown(String),
    /// It begins like a time, and is none: a field is missing or too large, or an offset is where none can be.
    #[error(
        "'{0}' is no time; give 2026-11-20T10:00:03Z, or on the local clock '2026-11-20 10:00:03', 2026-11-20 or \
         10:00:03 (months 01 to 12, hours 00 to 23, minutes and seconds 00 to 59; an offset such as +01:00 goes \
         behind a date and a time)"
    )]
    Malformed(String),
    /// The local clock showed that time twice or never, because it was set for summer or winter.
    #[error("'{0}' happened twice or never on the local clock; give it with its offset, such as {0}+01:00")]
    Ambiguous(String),
    /// A duration that leads into the future.
    #[error(
        "'{0}' lies in the future; for a time ago put a minus before it: -5m, or 'ago' behind it: '5m ago'"
    )]
    Future(String),
    /// Before 1970 or after 2554.
    #[error("'{0}' lies outside the years 1970 to 2554, which a journal can hold")]
    Range(String),
}
