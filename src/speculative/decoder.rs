//! [`Speculative`]: draft, one pass of the target over the tree, verification, commit.

use std::time::Instant;

use super::adapt::{Pupil, Verified};
use super::{Budget, Draft, DraftTree, Plan};
use crate::backend::{Accepted, Backend, Buffer, Draw, In, Mask, NO_TOKEN, Penalty, Rule, Trees};
use crate::decode::{DecodeStats, Decoder, Sampler, Session};
use crate::error::{Result, bail};
use crate::model::{Want, Workspace};

/// Extends a session by what its model would have said anyway, several tokens a pass.
///
/// Behind every node of the tree the target draws its token by the random number of the token's position, as
/// [`crate::decode::Autoregressive`] does; a drafted token stands if it is the one drawn. So the text is the same with and without a
/// draft, token by token, sampled or greedy.
pub struct Speculative<B: Backend> {
    draft: Box<dyn Draft<B>>,
    sampler: Sampler,
    budget: Budget<'static>,
    plan: Option<Plan>,
    pupil: Option<Box<dyn Pupil<B>>>,
    /// Of this step.
    tree: DraftTree,
    drafted: bool,
    /// Whether the draft has yet to read the prompt, which says nothing about later steps.
    fresh: bool,
    seconds: f64,
    sources: Vec<u8>,
    stats: DecodeStats,
    room: Option<Verifier<B>>,
}

impl<B: Backend> Speculative<B> {
    /// Draws by `sampler` and drafts within `budget`.
    pub fn new(draft: Box<dyn Draft<B>>, sampler: Sampler, budget: Budget<'static>) -> Self {
        let (tree, stats) = (DraftTree::new(0), DecodeStats::default());
        Self {
            draft,
            sampler,
            budget,
            plan: None,
            pupil: None,
            tree,
            drafted: false,
            fresh: true,
            seconds: 0.0,
            sources: Vec::new(),
            stats,
            room: None,
        }
    }

    /// Draws by `sampler` and drafts nothing: a session of [`super::SpeculativeBatch`] that takes one token a pass.
    pub fn plain(sampler: Sampler) -> Self {
        Self::new(Box::new(Silent), sampler, Budget::new(0, 0, 1))
    }

    /// Drafts as much of the budget as pays, and nothing while that does not.
    pub fn planned(self, plan: Plan) -> Self {
        Self { plan: Some(plan), ..self }
    }

    /// Tells `pupil` what verification finds, so that the draft learns from it.
    pub fn taught(self, pupil: Box<dyn Pupil<B>>) -> Self {
        Self { pupil: Some(pupil), ..self }
    }

    /// What it has learnt about costs and drafts.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// Tells the draft, and what it learns by, that the session's text is over, or over for now.
    pub fn finish(&mut self, s: &Session<B>) {
        self.draft.finish(s.tokens());
        self.pupil.iter_mut().for_each(|p| p.finish(s));
    }

    /// Whether all tokens but the last are in the session's cache, so that the next step is one of speculation.
    pub(super) fn is_ready(s: &Session<B>) -> bool {
        !s.cache().is_empty() && s.tokens().len() == s.cache().len() + 1
    }

    /// The passes of a prompt, which give the first token.
    pub(super) fn first(&mut self, s: &mut Session<B>) -> Result<usize> {
        self.stats.forwards += s.advance()?;
        let token = s.sample(&self.sampler)?;
        s.push(&[token]);
        Ok(self.begun())
    }

    /// The first token came.
    pub(super) fn begun(&mut self) -> usize {
        self.fresh = true;
        self.sources.clear();
        self.stats.tokens += 1;
        1
    }

    /// A pass reads part of the prompt. Behind its last token the tree is that token alone.
    pub(super) fn read(&mut self, s: &Session<B>) {
        self.tree.reset(s.tokens()[s.tokens().len() - 1]);
        self.drafted = false;
        self.stats.forwards += 1;
    }

    /// Drafts a tree of up to `most` nodes, node 0 counted, behind the session's last token.
    pub(super) fn propose(&mut self, s: &Session<B>, most: usize) -> Result<&DraftTree> {
        let start = Instant::now();
        let left = s.capacity() - s.tokens().len();
        self.tree.reset(s.tokens()[s.tokens().len() - 1]);
        let (nodes, depth) = (self.budget.nodes.min(most - 1).min(left), self.budget.depth.min(left));
        let budget = Budget { nodes, depth, plan: self.plan.as_ref(), ..self.budget };
        self.drafted = nodes > 0 && depth > 0 && self.plan.as_ref().is_none_or(Plan::speculates);
        if self.drafted {
            self.draft.propose(s, budget, &mut self.tree)?;
        }
        self.seconds = start.elapsed().as_secs_f64();
        Ok(&self.tree)
    }

    pub(super) fn tree(&self) -> &DraftTree {
        &self.tree
    }

    /// How the target's tokens behind the nodes are drawn; `first` is the number of node 0 among the rows of the pass.
    pub(super) fn draws(&self, s: &Session<B>, first: usize, draws: &mut Vec<Draw>, penalties: &mut Vec<Penalty>) {
        let (tree, text) = (&self.tree, s.tokens());
        for (node, &depth) in tree.depths().iter().enumerate() {
            draws.push(self.sampler.draw(s.key(text.len() as u64 + u64::from(depth))));
            let up = std::iter::successors(Some(node), |&u| Some(tree.parents()[u] as usize));
            // Of the tokens on the node's own path, and then of the text.
            let path = up.take_while(|&u| u != 0).map(|u| tree.tokens()[u]);
            penalties.extend(self.sampler.penalties((first + node) as u32, path.chain(text.iter().rev().copied())));
        }
    }

    /// What verification found, after `seconds`, was committed in `commit`.
    pub(super) fn conclude(&mut self, path: &[u32], next: u32, seconds: f64, commit: f64) -> usize {
        self.sources.clear();
        self.sources.extend(path[1..].iter().map(|&node| self.tree.sources()[node as usize] & DraftTree::DRAFT));
        if self.drafted {
            self.draft.verdict(&self.tree, path, next);
        }
        if let Some(plan) = &mut self.plan {
            let costly = (self.drafted && !self.draft.is_free()).then_some(&self.tree);
            let clock = if self.fresh { self.seconds.min(plan.cost().draft_fixed) } else { self.seconds };
            let draft = plan.drafting(clock, costly, self.budget.width);
            plan.observe(&self.tree, path, draft, seconds + commit);
        }
        self.fresh &= !self.drafted;
        let stats = &mut self.stats;
        stats.forwards += 1;
        stats.verifications += 1;
        stats.verified += path.len() as u64;
        stats.tokens += path.len() as u64;
        stats.drafted += self.tree.len() as u64 - 1;
        stats.draft_s += self.seconds;
        stats.verify_s += seconds;
        stats.commit_s += commit;
        path.len()
    }

    /// Teaches what the pass found whose logits are in `logits`, those of node 0 in row `first`: behind [`Speculative::conclude`].
    pub(super) fn teach(&mut self, s: &Session<B>, logits: &Workspace<B>, first: usize, path: &[u32], seconds: f64) {
        let Some(pupil) = &mut self.pupil else { return };
        let (start, drafted) = (Instant::now(), self.tree.len() > 1);
        let seconds = self.seconds + seconds;
        pupil.verified(&Verified { session: s, logits, first, path, drafted, seconds });
        self.stats.update_s += start.elapsed().as_secs_f64();
    }
}

/// Never asked.
struct Silent;

impl<B: Backend> Draft<B> for Silent {
    fn name(&self) -> &str {
        "none"
    }

    fn propose(&mut self, _: &Session<B>, _: Budget, _: &mut DraftTree) -> Result<()> {
        Ok(())
    }
}

impl<B: Backend> Decoder<B> for Speculative<B> {
    fn step(&mut self, s: &mut Session<B>) -> Result<usize> {
        if !Self::is_ready(s) {
            return self.first(s);
        }
        let most = s.workspace().max_logits();
        self.propose(s, most)?;
        let start = Instant::now();
        let (mut draws, mut penalties) = (Vec::with_capacity(self.tree.len()), Vec::new());
        self.draws(s, 0, &mut draws, &mut penalties);
        s.stage(self.tree.tokens(), Mask::Tree(&self.tree.mask()?), Want::All)?;
        if !penalties.is_empty() {
            s.penalize(self.tree.len(), &penalties)?;
        }
        let (model, trees) = (s.model().clone(), [&self.tree]);
        let room = match &mut self.room {
            Some(room) => room,
            none => none.insert(Verifier::new(model.backend(), most, 1)?),
        };
        let found = room.verify(model.backend(), s.logit_rows(draws.len()), &draws, &trees)?;
        let (path, next) = &found[0];
        let verified = Instant::now();
        s.commit(path)?;
        s.push(&[*next]);
        let (seconds, commit) = ((verified - start).as_secs_f64(), verified.elapsed().as_secs_f64());
        let given = self.conclude(path, *next, seconds, commit);
        self.teach(s, s.workspace(), 0, path, seconds + commit);
        Ok(given)
    }

    fn source(&self, i: usize) -> Option<u8> {
        self.sources.get(i).copied()
    }

    fn stats(&self) -> DecodeStats {
        self.stats
    }
}

/// Nodes kept of a tree, node 0 first, and the token behind the last.
pub(super) type Found = (Vec<u32>, u32);

/// Device buffers of a verification.
pub(super) struct Verifier<B: Backend> {
    picks: B::Buf<u32>,
    path: B::Buf<u32>,
    counts: B::Buf<u32>,
    next: B::Buf<u32>,
}

impl<B: Backend> Verifier<B> {
    /// For `nodes` nodes in the trees of `sequences` sequences.
    pub fn new(be: &B, nodes: usize, sequences: usize) -> Result<Self> {
        let path = be.alloc(nodes * sequences)?;
        Ok(Self { picks: be.alloc(nodes)?, path, counts: be.alloc(sequences)?, next: be.alloc(sequences)? })
    }

    /// Draws the target's token behind every node and follows them down each tree.
    ///
    /// # Errors
    /// `Diverged` where logits are not finite; the device's.
    pub fn verify(
        &mut self,
        be: &B,
        logits: In<'_, B, B::Acc>,
        draws: &[Draw],
        trees: &[&DraftTree],
    ) -> Result<Vec<Found>> {
        let (nodes, n) = (draws.len(), trees.len());
        let (sizes, mut tokens, mut parents) =
            (trees.iter().map(|t| t.len() as u32).collect::<Vec<_>>(), vec![], vec![]);
        for tree in trees {
            tokens.extend_from_slice(tree.tokens());
            parents.extend_from_slice(tree.parents());
        }
        let stride = trees.iter().map(|t| t.len()).max().unwrap_or(0);
        be.sample(self.picks.head_mut(nodes), logits, draws)?;
        let (path, counts, next) = (self.path.head_mut(n * stride), self.counts.head_mut(n), self.next.head_mut(n));
        let trees = Trees { sizes: &sizes, tokens: &tokens, parents: &parents };
        be.verify_tree(Accepted { path, counts, next }, &trees, Rule::Match(self.picks.head(nodes)))?;
        let (mut paths, mut kept, mut tokens) = (vec![0; n * stride], vec![0; n], vec![0; n]);
        be.download(self.counts.head(n), &mut kept)?;
        be.download(self.next.head(n), &mut tokens)?;
        be.download(self.path.head(n * stride), &mut paths)?;
        if tokens.contains(&NO_TOKEN) {
            bail!(Diverged, "the logits are not finite: the weights are damaged, or the computation overflowed");
        }
        let found = paths.chunks(stride.max(1)).zip(kept).zip(tokens);
        Ok(found.map(|((path, kept), next)| (path[..kept as usize].to_vec(), next)).collect())
    }
}
