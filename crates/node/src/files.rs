//! Files, by what can be checked on another node.
//!
//! Owns how a file is named to a peer ([`FileRef`]) and how a peer finds it again and makes sure it is the same.
//! Refuses to know whose file it is. Invariant: a file that cannot be shown to be the same is refused, never used.

use dunlin_proto::image::FileRef;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Describes the file behind a magic link of /proc (`/proc/PID/fd/N`, `exe`, `cwd`, `map_files/…`).
pub fn file_ref(link: &Path) -> io::Result<FileRef> {
    let path = std::fs::read_link(link)?.into_os_string().into_encoded_bytes();
    let meta = std::fs::metadata(link)?;
    Ok(FileRef {
        path,
        size: meta.size(),
        modified_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        mode: meta.mode(),
        inode: meta.ino(),
    })
}

/// Why a file on this node will not do.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not here, or cannot be opened.
    #[error("cannot be opened on the destination: {0}")]
    Open(io::Error),
    /// It is another file.
    #[error("is not the same file on the destination ({0})")]
    Differs(&'static str),
    /// It would be written to, and is not known to be one file for all nodes.
    #[error("is open for writing and not below a directory that the nodes share")]
    NotShared,
}

impl FileError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            FileError::Open(_) => "put the file at the same path on the destination (a shared file system does that)",
            FileError::Differs(_) => "bring both nodes to the same version of the file",
            FileError::NotShared => {
                "keep the file on a shared file system and name it in `shared` of both nodes' configurations"
            }
        }
    }
}

/// How a file will be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Only its bytes matter: they must be equal.
    Content,
    /// It is written, or its changes must be seen: it must be the very same file.
    Identity,
}

/// Opens, below the nest's root, the file that a peer described, and makes sure that it is the same.
pub fn open_same(
    root: BorrowedFd<'_>,
    file: &FileRef,
    flags: OFlags,
    wanted: Use,
    shared: &[PathBuf],
) -> Result<OwnedFd, FileError> {
    let path = Path::new(OsStr::from_bytes(&file.path));
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        relative
    };
    let flags = (flags - (OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC)) | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened =
        openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(|e| FileError::Open(e.into()))?;
    let is_shared = shared.iter().any(|s| path.starts_with(s));
    if wanted == Use::Identity && !is_shared {
        return Err(FileError::NotShared);
    }
    let here = file_ref(&proc_fd(&opened)).map_err(FileError::Open)?;
    if here.mode & 0o170_000 != file.mode & 0o170_000 {
        return Err(FileError::Differs("its type"));
    }
    match wanted {
        Use::Identity if here.inode != file.inode => Err(FileError::Differs("its inode")),
        Use::Identity => Ok(opened),
        Use::Content if here.size != file.size => Err(FileError::Differs("its size")),
        Use::Content if here.modified_ns != file.modified_ns && !(is_shared && here.inode == file.inode) => {
            Err(FileError::Differs("its modification time"))
        }
        Use::Content => Ok(opened),
    }
}

/// The path by which this process names one of its own descriptors.
pub fn proc_fd(fd: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Reads a whole file through a fresh description, so that its own offset stays.
pub fn contents(link: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(link)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("it is larger than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_file_is_found_and_another_refused() {
        let here = OwnedFd::from(File::open("/").unwrap());
        let file = File::open("/etc/passwd").unwrap();
        let described = file_ref(&proc_fd(&OwnedFd::from(file))).unwrap();
        use std::os::fd::AsFd;
        let open = |f: &FileRef, w, s: &[PathBuf]| open_same(here.as_fd(), f, OFlags::RDONLY, w, s);
        assert!(open(&described, Use::Content, &[]).is_ok());
        assert!(matches!(
            open(&described, Use::Identity, &[]),
            Err(FileError::NotShared)
        ));
        assert!(open(&described, Use::Identity, &["/etc".into()]).is_ok());
        let grown = FileRef {
            size: described.size + 1,
            ..described.clone()
        };
        assert!(matches!(
            open(&grown, Use::Content, &[]),
            Err(FileError::Differs("its size"))
        ));
        let gone = FileRef {
            path: b"/nowhere".to_vec(),
            ..described
        };
        assert!(matches!(open(&gone, Use::Content, &[]), Err(FileError::Open(_))));
    }
}
