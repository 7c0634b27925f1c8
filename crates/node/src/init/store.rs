//! The second holder of descriptors whose loss would be fatal, and of what a new daemon must know about them.
//!
//! Owns descriptors and bytes by label, within bounds. Refuses to know what they are. They live as long as the nest.

use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// At most so many labels.
const MAX_LABELS: usize = 64 << 10;
/// At most so many descriptors in all.
const MAX_FDS: usize = 256 << 10;
/// At most so many bytes in all.
const MAX_BYTES: usize = 256 << 20;

/// What is kept under one label.
#[derive(Debug)]
pub struct Kept {
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
    /// The bytes.
    pub blob: Vec<u8>,
}

/// Everything that is kept.
#[derive(Debug, Default)]
pub struct Store {
    kept: BTreeMap<String, Kept>,
    fds: usize,
    bytes: usize,
}

impl Store {
    /// Keeps this in place of what had the label. If it would be too much, everything stays as it was.
    pub fn put(&mut self, label: String, kept: Kept) -> Result<(), Errno> {
        let (old_fds, old_bytes) = self.get(&label).map_or((0, 0), |k| (k.fds.len(), k.blob.len()));
        let labels = self.kept.len() + usize::from(!self.kept.contains_key(&label));
        let (fds, bytes) = (
            self.fds - old_fds + kept.fds.len(),
            self.bytes - old_bytes + kept.blob.len(),
        );
        if labels > MAX_LABELS || fds > MAX_FDS || bytes > MAX_BYTES {
            return Err(Errno::NOSPC);
        }
        (self.fds, self.bytes) = (fds, bytes);
        self.kept.insert(label, kept);
        Ok(())
    }

    /// What is kept under a label.
    pub fn get(&self, label: &str) -> Option<&Kept> {
        self.kept.get(label)
    }

    /// Keeps it no longer. Was there something?
    pub fn remove(&mut self, label: &str) -> bool {
        match self.kept.remove(label) {
            Some(kept) => {
                self.fds -= kept.fds.len();
                self.bytes -= kept.blob.len();
                true
            }
            None => false,
        }
    }

    /// The labels, in order.
    pub fn labels(&self) -> Vec<String> {
        self.kept.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_too_much_changes_nothing() {
        let mut store = Store::default();
        let of = |bytes: usize| Kept {
            fds: vec![],
            blob: vec![0; bytes],
        };
        store.put("a".into(), of(10)).unwrap();
        assert_eq!(store.put("b".into(), of(MAX_BYTES)), Err(Errno::NOSPC));
        assert_eq!(store.put("a".into(), of(MAX_BYTES + 1)), Err(Errno::NOSPC));
        assert_eq!(store.get("a").unwrap().blob.len(), 10);
        store.put("a".into(), of(MAX_BYTES)).unwrap();
        assert!(store.remove("a") && !store.remove("a"));
        store.put("b".into(), of(MAX_BYTES)).unwrap();
        assert_eq!(store.labels(), ["b"]);
    }
}
