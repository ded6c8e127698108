//! [`Automaton`]: every substring of a text, and what followed it.

use hashbrown::HashMap;

/// No state or edge.
const NONE: u32 = u32::MAX;
/// Shorter suffixes of which a new token is counted: enough but for texts that repeat one token.
const COUNTED: usize = 32;

/// Substrings that end at the same places of the text.
#[derive(Clone, Copy, Debug)]
struct State {
    /// Length of the longest.
    len: u32,
    /// State of the longest suffix of them that ends at more places.
    link: u32,
    /// Places.
    count: u32,
    /// Latest place.
    end: u32,
    /// Newest of its edges.
    edge: u32,
}

#[derive(Clone, Copy, Debug)]
struct Edge {
    token: u32,
    to: u32,
    /// The state's edge before it.
    older: u32,
}

/// The suffix automaton of a text that grows at its end (Blumer et al. 1985, doi:10.1016/0304-3975(85)90157-4): at most two states
/// and three edges a token, amortised O(1) a token. It cannot forget.
#[derive(Clone, Debug)]
pub(super) struct Automaton {
    states: Vec<State>,
    edges: Vec<Edge>,
    /// Edge of a state and a token.
    find: HashMap<(u32, u32), u32>,
    text: Vec<u32>,
    last: u32,
}

/// A token that followed, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Continuation {
    pub token: u32,
    /// How often.
    pub count: u32,
    /// Where last.
    pub end: u32,
    /// The state behind it.
    to: u32,
}

/// A substring: its state and its length.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cursor {
    state: u32,
    pub len: usize,
}

impl Default for Automaton {
    /// Of an empty text.
    fn default() -> Self {
        let root = State { len: 0, link: NONE, count: 0, end: 0, edge: NONE };
        Self { states: vec![root], edges: Vec::new(), find: HashMap::new(), text: Vec::new(), last: 0 }
    }
}

impl Automaton {
    /// Back to an empty text.
    pub fn clear(&mut self) {
        self.states.truncate(1);
        self.states[0].edge = NONE;
        self.states[0].count = 0;
        self.edges.clear();
        self.find.clear();
        self.text.clear();
        self.last = 0;
    }

    /// All tokens so far.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// The longest suffix of the text that occurred before.
    pub fn suffix(&self) -> Cursor {
        let state = Some(self.states[self.last as usize].link).filter(|l| *l != NONE).unwrap_or(0);
        Cursor { state, len: self.len(state) }
    }

    /// Length of the longest substring of a state.
    fn len(&self, state: u32) -> usize {
        self.states[state as usize].len as usize
    }

    /// The longest suffix of `at` that occurred elsewhere too; `None` for the empty one.
    pub fn shorter(&self, at: Cursor) -> Option<Cursor> {
        let state = Some(self.states[at.state as usize].link).filter(|l| *l != NONE)?;
        Some(Cursor { state, len: self.len(state) })
    }

    /// The longest suffix of `at` of up to `max` tokens.
    pub fn within(&self, mut at: Cursor, max: usize) -> Cursor {
        while let Some(shorter) = self.shorter(at).filter(|s| s.len >= max) {
            at = shorter;
        }
        Cursor { len: at.len.min(max), ..at }
    }

    /// The longest suffix of `at` and `token` behind it that occurs in the text. Amortised O(1) a token, as at most one token is
    /// won by each.
    pub fn advance(&self, mut at: Cursor, token: u32) -> Cursor {
        loop {
            if let Some(&edge) = self.find.get(&(at.state, token)) {
                return Cursor { state: self.edges[edge as usize].to, len: at.len + 1 };
            }
            match self.shorter(at) {
                Some(shorter) => at = shorter,
                None => return Cursor::default(),
            }
        }
    }

    fn knows(&self, state: u32, token: u32) -> bool {
        self.find.contains_key(&(state, token))
    }

    /// What followed a substring, what was new last first.
    pub fn continuations(&self, at: Cursor) -> impl Iterator<Item = Continuation> {
        self.edges_of(at.state)
    }

    fn edges_of(&self, state: u32) -> impl Iterator<Item = Continuation> {
        let first = self.states[state as usize].edge;
        let edges = std::iter::successors(Some(first), |e| self.edges.get(*e as usize).map(|e| e.older));
        edges.map_while(|e| self.edges.get(e as usize)).map(|e| {
            let State { count, end, .. } = self.states[e.to as usize];
            Continuation { token: e.token, count, end, to: e.to }
        })
    }

    /// Appends a token.
    pub fn push(&mut self, token: u32) {
        self.text.push(token);
        let (len, end) = (self.len(self.last) as u32 + 1, self.text.len() as u32);
        let new = self.state(State { len, link: 0, count: 0, end, edge: NONE });
        let mut at = self.last;
        while at != NONE && !self.knows(at, token) {
            self.edge(at, token, new);
            at = self.states[at as usize].link;
        }
        if at != NONE {
            let to = self.edges[self.find[&(at, token)] as usize].to;
            let len = self.states[at as usize].len + 1;
            self.states[new as usize].link =
                if self.states[to as usize].len == len { to } else { self.split(at, token, to, len) };
        }
        self.last = new;
        let mut at = new;
        for _ in 0..COUNTED {
            let s = &mut self.states[at as usize];
            (s.count, s.end) = (s.count + 1, end);
            at = s.link;
            if at == NONE {
                break;
            }
        }
    }

    /// Gives the substrings of `to` that are no longer than `len` a state of their own, which the suffixes from `at` on lead to.
    fn split(&mut self, mut at: u32, token: u32, to: u32, len: u32) -> u32 {
        let short = self.state(State { len, edge: NONE, ..self.states[to as usize] });
        let mut edges: Vec<(u32, u32)> = self.edges_of(to).map(|c| (c.token, c.to)).collect();
        while let Some((token, to)) = edges.pop() {
            self.edge(short, token, to);
        }
        self.states[to as usize].link = short;
        while at != NONE {
            let edge = &mut self.edges[self.find[&(at, token)] as usize];
            if edge.to != to {
                break;
            }
            edge.to = short;
            at = self.states[at as usize].link;
        }
        short
    }

    fn state(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.states.len() as u32 - 1
    }

    fn edge(&mut self, from: u32, token: u32, to: u32) {
        let older = std::mem::replace(&mut self.states[from as usize].edge, self.edges.len() as u32);
        self.find.insert((from, token), self.edges.len() as u32);
        self.edges.push(Edge { token, to, older });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Places (one behind the last token) at which `part` ends.
    fn ends(text: &[u32], part: &[u32]) -> Vec<usize> {
        (part.len()..=text.len()).filter(|&e| text[e - part.len()..e] == *part).collect()
    }

    #[test]
    fn suffixes_and_continuations_are_those_of_a_search() {
        let mut rng = Rng::new(4);
        for case in 0..60 {
            let (alphabet, n) = (1 + rng.below(5), 1 + rng.below(60));
            // Texts that repeat themselves, too.
            let mut text: Vec<u32> = Vec::new();
            while text.len() < n {
                let from = rng.below(text.len() + 1);
                match rng.below(3) {
                    0 => text.extend_from_within(from..(from + 5).min(text.len())),
                    _ => text.push(rng.below(alphabet) as u32),
                }
            }
            let mut sam = Automaton::default();
            sam.push(9);
            sam.clear();
            for (i, &t) in text.iter().enumerate() {
                sam.push(t);
                let now = &text[..=i];
                let longest = (0..=i).rev().find(|&n| ends(now, &now[i + 1 - n..]).len() > 1 || n == 0).unwrap();
                assert_eq!(sam.suffix().len, longest, "case {case}: {now:?}");
                let mut at = Some(sam.suffix());
                while let Some(s) = at.filter(|s| s.len > 0) {
                    let part = &now[i + 1 - s.len..];
                    for c in sam.continuations(s) {
                        let whole = ends(now, &[part, &[c.token]].concat());
                        assert!(!whole.is_empty());
                        if i < COUNTED {
                            assert_eq!((whole.len(), whole.last()), (c.count as usize, Some(&(c.end as usize))));
                        }
                    }
                    let followed =
                        (0..alphabet as u32).filter(|t| !ends(now, &[part, &[*t]].concat()).is_empty()).count();
                    assert_eq!(sam.continuations(s).count(), followed, "case {case}: {now:?}");
                    at = sam.shorter(s);
                }
            }
            assert!(sam.states.len() <= 2 * n + 8 && sam.edges.len() <= 3 * n + 8);
        }
    }
}
