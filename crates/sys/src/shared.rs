//! Shared memory without a name: what mmap(2) makes with MAP_SHARED and MAP_ANONYMOUS.
//!
//! Owns how a descriptor of it is come by, which no call gives. Refuses to map it anywhere for good.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::fs::{File, OpenOptions};
use std::io;
use std::ptr;

/// As /proc names it, in any process that has it mapped.
pub const NAME: &[u8] = b"/dev/zero (deleted)";

/// Makes such memory of so many bytes: a file that can be mapped, read and written, and looks as if the mapping had made it.
/// Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN. See proc(5), `map_files`.
pub fn make(bytes: u64) -> io::Result<File> {
    let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: the kernel chooses a place where nothing is; nobody but this function knows of it.
    let at = unsafe { mmap_anonymous(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    let (start, end) = (at as usize, (at as usize + length).next_multiple_of(4096));
    let link = format!("/proc/self/map_files/{start:x}-{end:x}");
    let file = OpenOptions::new().read(true).write(true).open(link);
    // SAFETY: mapped above, and never handed out.
    unsafe { munmap(at, length) }?;
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn it_has_its_length_and_keeps_what_is_written() {
        let memory = make(3 << 12).unwrap();
        assert_eq!(memory.metadata().unwrap().len(), 3 << 12);
        memory.write_all_at(b"shared", 5000).unwrap();
        let mut bytes = [0; 6];
        memory.read_exact_at(&mut bytes, 5000).unwrap();
        assert_eq!(&bytes, b"shared");
        let link = std::fs::read_link(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
        assert_eq!(link.as_os_str().as_encoded_bytes(), NAME);
    }
}
