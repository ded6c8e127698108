//! Streaming text: bytes of tokens in, whole characters out, nothing past a stop string.

/// Collects the bytes of emitted tokens and releases them as text: never half a character, and never the beginning of what
/// may still become a stop string.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    stops: Vec<Vec<u8>>,
    held: Vec<u8>,
    stopped: bool,
}

impl TextStream {
    /// Ends at the first occurrence of any of `stops` (empty ones are ignored), which is itself left out.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops.iter().map(|s| s.as_ref().as_bytes().to_vec()).filter(|s| !s.is_empty()).collect();
        Self { stops, held: Vec::new(), stopped: false }
    }

    /// Whether a stop string has been met.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds bytes and returns the text that is certain by now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.extend_from_slice(bytes);
        let hit = self.stops.iter().filter_map(|s| self.held.windows(s.len()).position(|w| w == s)).min();
        if let Some(at) = hit {
            self.stopped = true;
            self.held.truncate(at);
            return self.finish();
        }
        // The longest end of the text that begins a stop string must wait.
        let begins = |at: usize| self.stops.iter().any(|s| s.starts_with(&self.held[at..]));
        let safe = (0..self.held.len()).find(|&at| begins(at)).unwrap_or(self.held.len());
        let whole = safe - incomplete_tail(&self.held[..safe]);
        let out: Vec<u8> = self.held.drain(..whole).collect();
        String::from_utf8_lossy(&out).into_owned()
    }

    /// The rest, at the end of a generation: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// Bytes at the end of `b` that begin a UTF-8 character without completing it.
fn incomplete_tail(b: &[u8]) -> usize {
    (1..=3.min(b.len()))
        .find(|&n| {
            let lead = b[b.len() - n];
            let want = match lead {
                0xC2..=0xDF => 2,
                0xE0..=0xEF => 3,
                0xF0..=0xF4 => 4,
                _ => 0,
            };
            want > n && std::str::from_utf8(&b[b.len() - n..]).is_err_and(|e| e.error_len().is_none())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn characters_stay_whole_whatever_the_split() {
        let text = "aé漢🦀 e\u{301} – ende";
        let mut rng = Rng::new(3);
        for _ in 0..500 {
            let (mut s, mut out, mut at) = (TextStream::new::<&str>(&[]), String::new(), 0);
            while at < text.len() {
                let n = (1 + rng.below(4)).min(text.len() - at);
                let piece = s.push(&text.as_bytes()[at..at + n]);
                assert!(!piece.contains('\u{FFFD}'));
                out += &piece;
                at += n;
            }
            assert_eq!(out + &s.finish(), text);
        }
    }

    #[test]
    fn broken_bytes_come_out_replaced_and_do_not_block() {
        let mut s = TextStream::new::<&str>(&[]);
        assert_eq!(s.push(&[b'a', 0xFF, b'b']), "a\u{FFFD}b");
        assert_eq!(s.push(&[0xE2, 0x82]), "");
        assert_eq!(s.finish(), "\u{FFFD}");
    }

    #[test]
    fn stop_strings_cross_token_borders() {
        let mut s = TextStream::new(&["<end>", "STOP"]);
        assert_eq!(s.push(b"one <"), "one ");
        assert_eq!(s.push(b"en"), "");
        assert_eq!(s.push(b"de ST"), "<ende ");
        assert_eq!(s.push(b"OP and more"), "");
        assert!(s.stopped());
        assert_eq!(s.push(b"more"), "");
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn held_text_is_released_at_the_end() {
        let mut s = TextStream::new(&["STOP"]);
        assert_eq!(s.push(b"a STO"), "a ");
        assert_eq!(s.finish(), "STO");
    }
}
