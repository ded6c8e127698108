//! Heads that read the target's features, each with the token behind it, and go on from their own output.

use std::ops::Range;
use std::sync::Arc;

use super::layer::{Layer, LayerRoom, Place};
use super::{CHUNK, Followed};
use crate::backend::{Backend, Buffer, In, Mask, Out, TreeMask};
use crate::decode::Session;
use crate::error::Result;
use crate::model::Model;
use crate::speculative::choices::Vocabulary;
use crate::speculative::{Budget, Draft, DraftTree, Pool};

/// What one kind of head makes of features and of its layer's output. A row's *feature* g is what the head knows of the text before
/// a token: of a committed row it comes from the target, of a drafted one it is the layer's output behind its parent.
pub(super) trait Form<B: Backend>: Send + Sync {
    fn name(&self) -> &'static str;
    fn taps(&self) -> &[usize];
    /// Writes g of committed rows to [`Room::g`].
    fn features(&self, session: &Session<B>, rows: Range<usize>, room: &mut Room<B>) -> Result<()>;
    /// From the embeddings and g of `rows` rows to the layer's residual stream x and to the operands of q, k and v, whose
    /// width it returns.
    fn enter(&self, be: &B, room: &mut Room<B>, rows: usize) -> Result<usize>;
    /// From rows of the layer's output to operands of the vocabulary matrix.
    fn leave(&self, be: &B, h: Out<'_, B, B::Act>, x: In<'_, B, B::Acc>) -> Result<()>;
}

/// One of the two buffers that rows are put together in.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    Parts,
    Joined,
}

/// Buffers of a pass of up to so many rows.
pub(super) struct Room<B: Backend> {
    d: usize,
    /// Embeddings, then g; like `joined` room for three rows of width d for each row of a pass.
    pub parts: B::Buf<B::Acc>,
    pub joined: B::Buf<B::Acc>,
    pub s: B::Buf<B::Act>,
    /// Residual stream of the layer.
    pub x: B::Buf<B::Acc>,
    h: B::Buf<B::Act>,
    /// A row of 0.
    zero: B::Buf<B::Acc>,
    layer: LayerRoom<B>,
    index: Vec<u32>,
}

impl<B: Backend> Room<B> {
    fn new(be: &B, layer: &Layer<B>, rows: usize) -> Result<Self> {
        let d = layer.cfg.hidden;
        Ok(Self {
            d,
            parts: be.alloc(3 * rows * d)?,
            joined: be.alloc(3 * rows * d)?,
            s: be.alloc(3 * rows * d)?,
            x: be.alloc(rows * d)?,
            h: be.alloc(rows * d)?,
            zero: be.alloc(d)?,
            layer: LayerRoom::new(be, &layer.cfg, rows)?,
            index: Vec::new(),
        })
    }

    /// Where [`Form::features`] puts g in `parts`, and [`Form::enter`] finds it: behind the embeddings.
    pub fn g(&self, rows: usize) -> Range<usize> {
        rows * self.d..2 * rows * self.d
    }

    /// Copies rows of a tapped layer to part `i` of `joined`.
    pub fn tapped(&mut self, be: &B, i: usize, from: In<'_, B, B::Acc>, rows: Range<usize>) -> Result<()> {
        let n = rows.len() * self.d;
        self.index.clear();
        self.index.extend(rows.map(|r| r as u32));
        be.gather_rows(self.joined.view_mut(i * n..(i + 1) * n), from, &self.index, self.d)
    }

    /// Zeros what a norm is to be added to.
    pub fn clear(&mut self, be: &B, of: Side, r: Range<usize>) -> Result<()> {
        self.index.clear();
        self.index.resize(r.len() / self.d, 0);
        let to = if of == Side::Joined { &mut self.joined } else { &mut self.parts };
        be.gather_rows(to.view_mut(r), self.zero.head(self.d), &self.index, self.d)
    }

    /// x = g.
    pub fn enter_by_g(&mut self, be: &B, rows: usize) -> Result<()> {
        self.index.clear();
        self.index.extend(0..rows as u32);
        let g = self.g(rows);
        be.gather_rows(self.x.head_mut(rows * self.d), self.parts.view(g), &self.index, self.d)
    }

    /// `count` parts of `rows` rows each, which lie one below the other, become operands side by side; the other buffer is
    /// overwritten.
    pub fn side_by_side(&mut self, be: &B, of: Side, count: usize, rows: usize) -> Result<()> {
        let n = count * rows * self.d;
        self.index.clear();
        self.index.extend((0..rows).flat_map(|r| (0..count).map(move |p| (p * rows + r) as u32)));
        let (from, to) =
            if of == Side::Joined { (&self.joined, &mut self.parts) } else { (&self.parts, &mut self.joined) };
        be.gather_rows(to.head_mut(n), from.head(n), &self.index, self.d)?;
        be.operand(self.s.head_mut(n), to.head(n))
    }
}

/// A head of some form behind a layer.
pub(super) struct Recurrent<B: Backend> {
    pub head: Arc<Head<B>>,
    pub state: Option<State<B>>,
}

/// What does not change while it drafts.
pub(super) struct Head<B: Backend> {
    pub model: Arc<Model<B>>,
    pub form: Box<dyn Form<B>>,
    pub layer: Layer<B>,
    /// The matrix behind the logits; `None`: the target's.
    pub vocabulary: Option<B::Weight>,
    /// The target's token for each id of the head, where they differ.
    pub tokens: Option<Vec<u32>>,
}

/// Cache and buffers, made for the first session.
pub(super) struct State<B: Backend> {
    /// Row t: the feature of token t with token t + 1.
    kv: B::Kv,
    capacity: usize,
    followed: Followed,
    pool: Pool,
    room: Room<B>,
    choices: Vocabulary<B>,
}

impl<B: Backend> Head<B> {
    fn state(&self, capacity: usize, width: usize) -> Result<State<B>> {
        let be = self.model.backend();
        let vocab = self.tokens.as_ref().map_or(self.model.config().vocab, Vec::len);
        Ok(State {
            kv: be.kv_alloc(1, capacity, self.layer.cfg.kv_dim())?,
            capacity,
            followed: Followed::default(),
            pool: Pool::new(width),
            room: Room::new(be, &self.layer, CHUNK.max(width))?,
            choices: Vocabulary::new(be, vocab, width, width)?,
        })
    }

    /// One pass over rows whose g is in place.
    fn pass(&self, st: &mut State<B>, tokens: &[u32], at: &Place<'_>) -> Result<()> {
        let (be, State { kv, room, .. }) = (self.model.backend(), st);
        let (rows, (table, scale)) = (tokens.len(), self.model.embedding());
        be.embed(room.parts.head_mut(rows * room.d), table, tokens, scale)?;
        let width = self.form.enter(be, room, rows)?;
        self.layer.run(be, &mut room.layer, &mut room.x, room.s.head(rows * width), kv, at)
    }

    /// Gives the pool the tokens behind these rows of the last pass.
    fn choose(&self, st: &mut State<B>, rows: Range<usize>) -> Result<()> {
        let (be, State { pool, room, choices, .. }) = (self.model.backend(), st);
        let (n, d) = (rows.len(), room.d);
        self.form.leave(be, room.h.head_mut(n * d), room.x.view(rows.start * d..rows.end * d))?;
        let w = self.vocabulary.as_ref().unwrap_or_else(|| self.model.vocabulary());
        let (ids, ln_q) = choices.read(be, n, room.h.head(n * d), w, None, self.tokens.as_deref())?;
        pool.expand(ids, ln_q);
        Ok(())
    }

    /// Reads what is new of the session, and gives the tokens behind its last, which are the output of the last pass' row
    /// that is returned.
    fn catch_up(&self, st: &mut State<B>, session: &Session<B>) -> Result<usize> {
        let (tokens, n) = (session.tokens(), session.cache().len());
        // A row knows the token behind it. The last is read again if nothing is new, for what it gives.
        let kept = st.followed.keep(tokens).saturating_sub(1).min(n - 1);
        let mut last = 0;
        for from in (kept..n).step_by(CHUNK) {
            let rows = from..n.min(from + CHUNK);
            self.form.features(session, rows.clone(), &mut st.room)?;
            let place = Place { past: from, staged: 0, rows: rows.len(), mask: Mask::Causal };
            self.pass(st, &tokens[rows.start + 1..rows.end + 1], &place)?;
            last = rows.len() - 1;
        }
        st.followed.read(&tokens[..n + 1]);
        self.choose(st, last..last + 1)?;
        Ok(last)
    }

    /// Reads the frontier, whose rows stand behind `past` committed ones.
    fn level(&self, st: &mut State<B>, past: usize, above: Above) -> Result<()> {
        let (be, State { pool, room, .. }) = (self.model.backend(), &mut *st);
        let (frontier, d) = (pool.frontier(), room.d);
        let rows = frontier.len();
        let parents = pool.parents()[frontier.clone()].iter();
        room.index.clear();
        let out = match above {
            Above::Row(r) => {
                room.index.resize(rows, r as u32);
                r + 1
            }
            Above::From(first) => {
                room.index.extend(parents.map(|&p| p - first as u32));
                frontier.start - first
            }
        };
        let g = room.g(rows);
        be.gather_rows(room.parts.view_mut(g), room.x.head(out * d), &room.index, d)?;
        let (mask, tokens) = (TreeMask::new(pool.parents())?, pool.tokens()[frontier.clone()].to_vec());
        self.pass(st, &tokens, &Place { past, staged: frontier.start, rows, mask: Mask::Tree(&mask) })?;
        self.choose(st, 0..rows)
    }
}

/// Where the outputs of the last pass stand.
#[derive(Clone, Copy)]
enum Above {
    /// This row is above all.
    Row(usize),
    /// They are the pool's rows from this one on.
    From(usize),
}

impl<B: Backend> super::Another for Recurrent<B> {
    fn another(&self) -> Self {
        Recurrent { head: self.head.clone(), state: None }
    }
}

impl<B: Backend> Draft<B> for Recurrent<B> {
    fn name(&self) -> &str {
        self.head.form.name()
    }

    fn taps(&self) -> &[usize] {
        self.head.form.taps()
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        let Self { head, state } = self;
        super::check(session, &head.model, head.form.taps())?;
        let (n, Budget { nodes, depth, width, .. }) = (session.cache().len(), budget);
        if n == 0 || nodes == 0 || depth == 0 || width == 0 {
            return Ok(());
        }
        let capacity = session.capacity() + depth * width;
        let st = match state {
            Some(st) if st.capacity >= capacity && st.pool.width() == width => st,
            _ => state.insert(head.state(capacity, width)?),
        };
        st.pool.reset();
        let mut above = Above::Row(head.catch_up(st, session)?);
        while st.pool.depth() < nodes && budget.expands(&st.pool) {
            let frontier = st.pool.frontier();
            head.level(st, n, above)?;
            above = Above::From(frontier.start);
        }
        st.pool.finish(budget.size(&st.pool), budget.source, tree);
        Ok(())
    }
}
