//! One error type for the whole crate: small outside, rich inside.
//!
//! An [`Error`] has a [kind](ErrorKind), one sentence that says what was asked and what was found, a chain of contexts
//! that says where, and, where there is one, the error beneath it.

use std::fmt;

/// What went wrong, coarsely: enough for a caller to decide what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A model configuration is missing, contradictory or out of range.
    Config,
    /// A weight file is damaged, or a tensor is missing or has the wrong shape.
    Weights,
    /// A tokenizer or a chat template is missing, damaged or of an unknown kind.
    Tokenizer,
    /// Buffers or arguments do not fit together.
    Shape,
    /// A limit was reached: context length, rows in a pass, memory.
    Capacity,
    /// Something valid that this build or this device does not do.
    Unsupported,
    /// The compute device or its driver failed.
    Device,
    /// The operating system refused: file, network client, child process.
    Io,
    /// A computation left the finite numbers.
    Diverged,
    /// A flag or an argument given by the user is impossible.
    Usage,
}

struct Repr {
    kind: ErrorKind,
    message: String,
    context: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The crate's error. One word wide; see [`Error::kind`] for its class and `Display` for the whole sentence.
pub struct Error(Box<Repr>);

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr { kind, message: message.into(), context: Vec::new(), source: None }))
    }

    /// The same with the error that caused it; `Display` appends its text.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let mut e = Self::new(kind, message);
        e.0.source = Some(source.into());
        e
    }

    /// An I/O error on `what` (usually a path).
    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        Self::with_source(ErrorKind::Io, what.to_string(), source)
    }

    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Adds where it happened, outermost last.
    #[must_use]
    pub fn at(mut self, context: impl Into<String>) -> Self {
        self.0.context.push(context.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.context.iter().rev() {
            write!(f, "{c}: ")?;
        }
        f.write_str(&self.0.message)?;
        if let Some(s) = &self.0.source {
            write!(f, ": {s}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

/// Adds context to the error of a `Result`.
pub trait Context<T> {
    /// `file.gguf: ` in front of the message, evaluated only on failure.
    fn context(self, f: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, f: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.at(f()))
    }
}

/// `bail!(Kind, "format", ..)`: return an [`Error`] of that [`ErrorKind`].
macro_rules! bail {
    ($kind:ident, $($arg:tt)*) => {
        return Err($crate::error::Error::new($crate::error::ErrorKind::$kind, format!($($arg)*)))
    };
}
pub(crate) use bail;

/// `ensure!(condition, Kind, "format", ..)`: [`bail!`] unless the condition holds.
macro_rules! ensure {
    ($cond:expr, $kind:ident, $($arg:tt)*) => {
        if !$cond { $crate::error::bail!($kind, $($arg)*) }
    };
}
pub(crate) use ensure;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_read_from_the_outside_in() {
        let e: Result<()> = Err(Error::new(ErrorKind::Weights, "expected [2, 3], file has [3, 2]"));
        let e = e.context(|| "blk.0.attn_q.weight".into()).context(|| "model.gguf".into()).unwrap_err();
        assert_eq!(e.to_string(), "model.gguf: blk.0.attn_q.weight: expected [2, 3], file has [3, 2]");
        assert_eq!(e.kind(), ErrorKind::Weights);
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
