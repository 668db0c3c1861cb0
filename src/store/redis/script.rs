//! The server's side of a write, as a Redis function where there are functions (Redis 7), else as a script.

use sha2::{Digest, Sha256};
use std::sync::LazyLock;

const NEWEST: &str = include_str!("newest.lua");

/// The program as both kinds of server take it. The library's name holds a hash of its code, so that two versions of
/// driftline on one server never call each other's.
pub(super) struct Program {
    /// Source for `FUNCTION LOAD`.
    pub library: String,
    /// Function that the library registers.
    pub function: String,
    /// Source for `SCRIPT LOAD` and `EVAL`.
    pub script: String,
}

pub(super) static PROGRAM: LazyLock<Program> = LazyLock::new(|| {
    let hash = hex::encode(&Sha256::digest(NEWEST)[..4]);
    let function = format!("driftline_newest_{hash}");
    Program {
        library: format!("#!lua name=driftline_{hash}\n{NEWEST}\nredis.register_function('{function}', newest)\n"),
        script: format!("{NEWEST}\nreturn newest(KEYS, ARGV)\n"),
        function,
    }
});

/// How the server runs the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Installed {
    /// `FCALL`.
    Function,
    /// `EVALSHA` of this SHA-1.
    Script(String),
    /// `EVAL` of the source, where a server does not know the SHA-1.
    Source,
}
