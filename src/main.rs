//! The `quadriga` command: see `quadriga --help`.

fn main() -> std::process::ExitCode {
    quadriga::cli::main()
}
