// Masked positions and their tokens, exactly.
#include "harness.h"
#include "../../unmask.cu"
#include <algorithm>

using test::Array;
using test::Rng;

// What becomes of one sequence, row by row and word by word.
TEST(unmask) {
  const u32 sequences = 9;
  for (u32 trial = 0; trial < 12; trial++) {
    Rng rng(50 + trial);
    Array<Masked> texts(sequences);
    std::vector<u32> positions;
    u32 rows = 0, length = 0;
    for (u32 s = 0; s < sequences; s++) {
      const u32 len = s == 4 ? 900 : 1 + rng.bits() % 70, first = rows;
      for (u32 p = 0; p < len; p++)
        if (rng.bits() % 3 || (trial == 0 && p == 0)) positions.push_back(p), rows++;
      Masked& m = texts[s];
      m = Masked{first, rows - first, length, rng.bits() % 2, float(rng.bits() % 12) / 4, rng.bits() % 4, 0, 0, 0, 0};
      m.forced_from = rng.bits() % len, m.forced_to = m.forced_from + rng.bits() % 30;
      m.fill_from = rng.bits() % len, m.fill_to = rng.bits() % 3 ? len : m.fill_from;
      if (rng.bits() % 3 == 0) m.limit = -INFINITY;
      length += len + 2;  // two tokens of none
    }
    Array<u32> picks(rows), argmax(rows), pos(rows), eos(2), tokens(length), taken(rows);
    Array<float> stats(3 * rows);
    picks.fill([&](size_t) { return rng.bits() % 9 ? 100 + rng.bits() % 30 : NO_TOKEN; });
    argmax.fill([&](size_t) { return rng.bits() % 9 ? 200 + rng.bits() % 30 : NO_TOKEN; });
    stats.fill([&](size_t i) {
      const u32 kind = rng.bits() % 16;
      return kind == 0 ? NAN : kind == 1 ? -0.f : float(rng.bits() % 12) / 4 + (i % 3 == 1 ? 3 : 0);
    });
    pos.fill([&](size_t i) { return positions[i]; });
    eos[0] = 105, eos[1] = 7;
    tokens.fill([&](size_t) { return rng.bits() % 40; });
    const std::vector<u32> was(tokens.p, tokens.p + length);
    const Unmask args{{texts.p}, {picks.p}, {argmax.p}, {stats.p}, {pos.p}, {eos.p}, {tokens.p}, {taken.p}, sequences, rows, length, 2};
    test::launch3("unmask", args, sequences, 256, 0, tokens);
    std::vector<u32> want = was;
    for (u32 s = 0; s < sequences; s++) {
      const Masked m = texts[s];
      std::vector<u32> ranked, got(m.rows, NO_TOKEN);
      auto cost = [&](u32 r) {
        const float* x = stats.p + 3 * (m.first + r);
        return m.score ? x[1] - x[0] : x[2];
      };
      for (u32 r = 0; r < m.rows; r++)
        if (!std::isnan(cost(r)) && picks[m.first + r] != NO_TOKEN && argmax[m.first + r] != NO_TOKEN) ranked.push_back(r);
      std::stable_sort(ranked.begin(), ranked.end(), [&](u32 a, u32 b) { return cost(a) < cost(b); });
      auto forced = [&](u32 r) { return pos[m.first + r] >= m.forced_from && pos[m.first + r] < m.forced_to; };
      bool met = false;
      for (u32 i = 0; i < ranked.size(); i++) {
        const u32 r = ranked[i];
        if (i < m.best || cost(r) < m.limit) got[r] = picks[m.first + r], met |= forced(r);
      }
      for (u32 i = 0; i < ranked.size() && !met; i++)
        if (forced(ranked[i])) got[ranked[i]] = argmax[m.first + ranked[i]], met = true;
      for (u32 r = 0; r < m.rows; r++) {
        CHECK(taken[m.first + r] == got[r], "trial %u, sequence %u, row %u: %u, not %u", trial, s, r, taken[m.first + r], got[r]);
        if (got[r] != NO_TOKEN) want[m.text + pos[m.first + r]] = got[r];
      }
      bool ended = false;
      for (u32 p = m.fill_from; p < m.fill_to; p++) {
        u32& t = want[m.text + p];
        if (ended) t = eos[0];
        ended |= t == eos[0] || t == eos[1];
      }
    }
    for (u32 i = 0; i < length; i++) CHECK(tokens[i] == want[i], "trial %u, token %u: %u, not %u", trial, i, tokens[i], want[i]);
  }
}
