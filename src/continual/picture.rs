//! Pictures of a stream: its tree and its scores, as SVG.

use std::fmt::Write as _;

use super::metrics::Scores;
use super::tree::Tree;

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn open(w: f64, h: f64) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0}" height="{h:.0}" viewBox="0 0 {w:.0} {h:.0}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{w:.0}" height="{h:.0}" fill="#fff"/>
"##
    )
}

/// The tree from left to right, a task a line; inner nodes carry what split them.
pub fn tree_svg(tree: &Tree, name: &dyn Fn(usize) -> String) -> String {
    const STEP: f64 = 110.0;
    const LINE: f64 = 26.0;
    // Tasks in the order of the leaves, and the height at which each node stands.
    let mut line = 0.0;
    let mut height = vec![0.0; tree.nodes.len()];
    let mut labels = Vec::new();
    let mut order = Vec::new();
    let mut open_nodes = if tree.nodes.is_empty() { Vec::new() } else { vec![0] };
    while let Some(i) = open_nodes.pop() {
        order.push(i);
        let node = &tree.nodes[i];
        if node.children.is_empty() {
            let first = line;
            for &k in &node.tasks {
                labels.push((node.depth, line, name(k)));
                line += 1.0;
            }
            height[i] = (first + line - 1.0) / 2.0;
        }
        open_nodes.extend(node.children.iter().rev());
    }
    for &i in order.iter().rev() {
        let c = &tree.nodes[i].children;
        if let (Some(&a), Some(&b)) = (c.first(), c.last()) {
            height[i] = (height[a] + height[b]) / 2.0;
        }
    }
    let widest = labels.iter().map(|l| l.2.chars().count()).max().unwrap_or(0) as f64;
    let (x, y) = (|depth: usize| 24.0 + STEP * depth as f64, |line: f64| 28.0 + LINE * line);
    let mut s = open(x(tree.levels()) + 60.0 + 8.0 * widest, y(line) + 4.0);
    for &i in &order {
        let node = &tree.nodes[i];
        let (at, from) = (x(node.depth), y(height[i]));
        for &c in &node.children {
            let _ = writeln!(
                s,
                r##"<path d="M{at:.1} {from:.1}V{:.1}H{:.1}" fill="none" stroke="#1f4e8c" stroke-width="1.5"/>"##,
                y(height[c]),
                x(tree.nodes[c].depth)
            );
        }
        if !node.children.is_empty() {
            let _ = writeln!(
                s,
                r##"<circle cx="{at:.1}" cy="{from:.1}" r="3.5" fill="#1f4e8c"/><text x="{:.1}" y="{:.1}" font-size="11" fill="#666">{:.3}</text>"##,
                at + 6.0,
                from - 5.0,
                node.threshold
            );
        } else if node.tasks.len() > 1 {
            let _ = writeln!(
                s,
                r##"<path d="M{:.1} {:.1}V{:.1}" stroke="#c4421a" stroke-width="4"/>"##,
                at + 2.0,
                from - LINE * (node.tasks.len() as f64 - 1.0) / 2.0 - 8.0,
                from + LINE * (node.tasks.len() as f64 - 1.0) / 2.0 + 8.0
            );
        }
    }
    for (depth, line, label) in labels {
        let _ = writeln!(s, r##"<text x="{:.1}" y="{:.1}">{}</text>"##, x(depth) + 10.0, y(line) + 4.5, escape(&label));
    }
    s + "</svg>\n"
}

/// The matrix of scores: a row after each task, darker where more is right.
pub fn scores_svg(scores: &Scores, title: &str, name: &dyn Fn(usize) -> String) -> String {
    const CELL: (f64, f64) = (58.0, 30.0);
    let n = scores.rows.iter().map(Vec::len).max().unwrap_or(0);
    let widest = (0..n).map(|k| name(k).chars().count()).max().unwrap_or(0) as f64;
    let (left, top) = (40.0 + 8.0 * widest, 66.0);
    let mut s = open(left + CELL.0 * n as f64 + 24.0, top + CELL.1 * scores.rows.len() as f64 + 20.0);
    let _ = writeln!(s, r##"<text x="12" y="24" font-size="16">{}</text>"##, escape(title));
    for k in 0..n {
        let x = left + CELL.0 * (k as f64 + 0.5);
        let short: String = name(k).chars().take(8).collect();
        let _ =
            writeln!(s, r##"<text x="{x:.1}" y="56" font-size="11" text-anchor="middle">{}</text>"##, escape(&short));
    }
    for (i, row) in scores.rows.iter().enumerate() {
        let y = top + CELL.1 * i as f64;
        let label = escape(&format!("after {}", name(i)));
        let _ = writeln!(
            s,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="end" font-size="12">{label}</text>"##,
            left - 8.0,
            y + 19.0
        );
        for (j, v) in row.iter().enumerate() {
            let v = v.clamp(0.0, 1.0);
            // From white to a deep blue.
            let [r, g, b] = [(255.0, 31.0), (255.0, 78.0), (255.0, 140.0)].map(|(a, z): (f64, f64)| a + (z - a) * v);
            let ink = if v > 0.55 { "#fff" } else { "#222" };
            let x = left + CELL.0 * j as f64;
            let _ = writeln!(
                s,
                r##"<rect x="{x:.1}" y="{y:.1}" width="{}" height="{}" fill="rgb({r:.0},{g:.0},{b:.0})"/><text x="{:.1}" y="{:.1}" text-anchor="middle" fill="{ink}">{:.0}</text>"##,
                CELL.0 - 2.0,
                CELL.1 - 2.0,
                x + CELL.0 / 2.0,
                y + 19.0,
                100.0 * v
            );
        }
    }
    s + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_name_every_task_and_are_closed() {
        let tree = Tree::farthest_pair(4, 2, 0.5, |_, a, b| if (a < 2) == (b < 2) { 0.1 } else { 0.9 });
        let names = |k: usize| format!("<task {k}>");
        let scores = Scores { rows: vec![vec![0.5], vec![0.2, 1.0]], ..Scores::default() };
        let (a, b) = (tree_svg(&tree, &names), scores_svg(&scores, "A & B", &names));
        assert!((0..4).all(|k| a.contains(&format!("&lt;task {k}&gt;"))), "{a}");
        assert!(b.contains("A &amp; B") && b.contains(">100<") && b.contains(">20<"));
        for s in [a, b, tree_svg(&Tree::default(), &names)] {
            assert!(
                s.starts_with("<svg")
                    && s.ends_with("</svg>\n")
                    && s.matches("<text").count() == s.matches("</text>").count()
            );
        }
    }
}
