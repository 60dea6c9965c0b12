//! The crate's one error type.

use core::fmt;

/// What was wrong, coarsely enough to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FormatErrorKind {
    /// Fewer bytes than the layout needs: a torn tail, or more is still to come.
    Truncated,
    /// The magic number is another one: these bytes are something else.
    Magic,
    /// A version that this program does not know.
    Version,
    /// A checksum does not match: torn, lost, misdirected or rotten bytes.
    Checksum,
    /// A field holds a value outside its range.
    Invalid,
    /// A length exceeds its limit.
    TooLarge,
}

/// Why some bytes were refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FormatError {
    kind: FormatErrorKind,
    what: &'static str,
    detail: &'static str,
}

impl FormatError {
    /// An error of the given kind about `what`.
    #[must_use]
    pub const fn new(kind: FormatErrorKind, what: &'static str, detail: &'static str) -> Self {
        Self { kind, what, detail }
    }

    pub(crate) const fn truncated(what: &'static str) -> Self {
        Self::new(FormatErrorKind::Truncated, what, "fewer bytes than the layout needs")
    }

    pub(crate) const fn invalid(what: &'static str, detail: &'static str) -> Self {
        Self::new(FormatErrorKind::Invalid, what, detail)
    }

    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> FormatErrorKind {
        self.kind
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            FormatErrorKind::Truncated => "truncated",
            FormatErrorKind::Magic => "wrong magic number",
            FormatErrorKind::Version => "unknown version",
            FormatErrorKind::Checksum => "checksum mismatch",
            FormatErrorKind::Invalid => "invalid",
            FormatErrorKind::TooLarge => "too large",
        };
        write!(f, "{}: {kind}: {}", self.what, self.detail)
    }
}

impl std::error::Error for FormatError {}
