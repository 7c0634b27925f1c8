//! What /proc says of one process, parsed.
//!
//! Owns the text formats of proc(5): maps, smaps' VmFlags, status, stat, fdinfo, limits, timers. The parsers take text and know
//! no files, so that they are tested on texts; [`ProcDir`] opens them. Refuses to know what the values are for.
//! Invariants: a line that does not parse is an error that names it, never a guess.

pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod net;
pub mod special;
pub mod stat;
pub mod status;

use rustix::fs::{Mode, OFlags};
use rustix::path::DecInt;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One directory of /proc: a process, or one of its threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcDir(PathBuf);

/// The descriptor table of a process.
#[derive(Debug)]
pub struct Descriptors {
    links: OwnedFd,
    infos: OwnedFd,
}

impl Descriptors {
    /// Where a descriptor leads.
    pub fn link(&self, number: i32) -> io::Result<PathBuf> {
        let link = rustix::fs::readlinkat(&self.links, DecInt::new(number), Vec::new())?;
        Ok(OsString::from_vec(link.into_bytes()).into())
    }

    /// A descriptor's fdinfo, whole, in place of what is in the buffer.
    pub fn info_into(&self, number: i32, buffer: &mut Vec<u8>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.infos, DecInt::new(number), flags, Mode::empty())?;
        let mut some = [0; 4096];
        buffer.clear();
        loop {
            let got = rustix::io::read(&file, &mut some)?;
            buffer.extend_from_slice(&some[..got]);
            // It is one record: the kernel gives less than there is room for only where it ends.
            if got < some.len() {
                return Ok(());
            }
        }
    }
}

/// A text of /proc that is not as proc(5) has it.
#[derive(Debug, thiserror::Error)]
#[error("{file} has {line:?}, which is not as proc(5) describes it")]
pub struct ParseError {
    /// Which file.
    pub file: &'static str,
    /// The line.
    pub line: String,
}

impl From<ParseError> for io::Error {
    fn from(error: ParseError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

pub(crate) fn bad(file: &'static str, line: &str) -> ParseError {
    ParseError {
        file,
        line: line.chars().take(200).collect(),
    }
}

impl ProcDir {
    /// `/proc/PID`.
    pub fn process(pid: i32) -> ProcDir {
        ProcDir(format!("/proc/{pid}").into())
    }

    /// That of the caller's process.
    pub fn own() -> ProcDir {
        ProcDir::process(std::process::id() as i32)
    }

    /// `/proc/PID/task/TID`.
    pub fn thread(pid: i32, tid: i32) -> ProcDir {
        ProcDir(format!("/proc/{pid}/task/{tid}").into())
    }

    /// The path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// One of its files, whole, in one buffer that is only grown.
    pub fn read_into(&self, name: &str, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        File::open(self.path(name))?.read_to_end(buffer).map(|_| ())
    }

    /// One of its files, whole.
    pub fn bytes(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::new();
        self.read_into(name, &mut buffer)?;
        Ok(buffer)
    }

    /// One of its files as text; bytes that are not UTF-8 (a strange path or name) are replaced.
    pub fn text(&self, name: &str) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes(name)?).into_owned())
    }

    /// Where one of its links leads.
    pub fn link(&self, name: &str) -> io::Result<PathBuf> {
        std::fs::read_link(self.path(name))
    }

    /// The names in one of its directories that are numbers, ascending.
    pub fn numbers(&self, name: &str) -> io::Result<Vec<i32>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(self.path(name))? {
            numbers.extend(entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The descriptor table, of which many entries are looked at: `/proc/PID` is looked up once for all.
    pub fn descriptors(&self) -> io::Result<Descriptors> {
        let open = |name| rustix::fs::open(self.path(name), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Ok(Descriptors {
            links: open("fd")?,
            infos: open("fdinfo")?,
        })
    }

    /// The threads of a process, in the numbering of the reader's PID namespace.
    pub fn threads(&self) -> io::Result<Vec<i32>> {
        self.numbers("task")
    }

    /// The status file, parsed.
    pub fn status(&self) -> io::Result<status::Status> {
        Ok(status::Status::parse(&self.text("status")?)?)
    }

    /// The stat file, parsed.
    pub fn stat(&self) -> io::Result<stat::Stat> {
        Ok(stat::Stat::parse(&self.bytes("stat")?)?)
    }
}
