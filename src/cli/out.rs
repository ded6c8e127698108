//! Output helpers that all verbs share.

use std::io::Write;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::{Error, Result};

/// Writes to stdout at once; a closed pipe comes back as the error that `main` takes for success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("stdout", e))
}

/// One JSON object and a newline.
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value}\n"))
}

/// A bar on stderr, invisible where stderr is no terminal.
pub fn bar(total: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}

/// The bar of a loading model.
pub fn load_bar() -> ProgressBar {
    bar(0, "loading")
}

/// Peak resident memory of this process, in units of 10^6 bytes, where the system tells.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(kib.trim().trim_end_matches("kB").trim().parse::<f64>().ok()? * 1024.0 / 1e6)
}

/// Bytes that could be had without swapping, where the system tells.
pub fn available_memory() -> Option<usize> {
    let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = memory.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(kib.trim().trim_end_matches("kB").trim().parse::<usize>().ok()? * 1024)
}

/// Rounded for JSON: measurements do not have sixteen digits.
pub fn round(x: f64, digits: i32) -> f64 {
    let s = 10f64.powi(digits);
    (x * s).round() / s
}

/// The middle value, or the mean of the two in the middle.
pub fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    let n = v.len();
    if n == 0 { f64::NAN } else { (v[(n - 1) / 2] + v[n / 2]) / 2.0 }
}
