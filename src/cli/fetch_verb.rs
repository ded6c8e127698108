//! `quadriga fetch`.

use serde_json::json;

use super::fetch::{Progress, fetch};
use super::flags::{Common, FetchArgs};
use super::out;
use crate::error::Result;

pub(super) fn run(common: &Common, args: &FetchArgs) -> Result<()> {
    let path = fetch(&args.name, Progress::Stderr)?;
    if common.json {
        return out::print_json(&json!({ "model": args.name, "path": path }));
    }
    out::print(&format!("{}\n", path.display()))
}
