//! What only the system can say or do about folders.

use std::fs::{self, File};
use std::path::Path;

use crate::{Error, Result};

/// Whether a folder holds nothing.
pub fn is_empty(folder: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    Ok(entries.next().is_none())
}

/// Brings the names inside a folder to the disk.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(Error::io("sync", folder))
}

/// Free bytes for ordinary users on the disk of `folder`.
pub fn free_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes())
        .map_err(|error| Error::io("read", folder)(error.into()))?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL and `stats` is large enough for the call to fill.
    if unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) } != 0 {
        return Err(Error::io("read", folder)(std::io::Error::last_os_error()));
    }
    // SAFETY: the call returned 0, so it filled `stats`.
    let stats = unsafe { stats.assume_init() };
    // The fields are u32 on some systems.
    #[allow(clippy::unnecessary_cast)]
    Ok(stats.f_bavail as u64 * stats.f_frsize as u64)
}

/// Copies `bytes` from one file to another without a way through this process. Returns how many were copied: fewer than
/// asked, or none, where the system cannot; the caller writes the rest.
#[cfg(target_os = "linux")]
pub fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, bytes: u64) -> u64 {
    use std::os::fd::AsRawFd;
    let (mut source, mut target) = (from_offset as i64, to_offset as i64);
    let mut copied = 0;
    while copied < bytes {
        let rest = (bytes - copied) as usize;
        // SAFETY: both descriptors are open, and both offsets live, for the whole call.
        let done =
            unsafe { libc::copy_file_range(from.as_raw_fd(), &mut source, to.as_raw_fd(), &mut target, rest, 0) };
        match done {
            1.. => copied += done as u64,
            _ => break,
        }
    }
    copied
}

/// Elsewhere every byte is written by the caller.
#[cfg(not(target_os = "linux"))]
pub fn copy_range(_from: &File, _from_offset: u64, _to: &File, _to_offset: u64, _bytes: u64) -> u64 {
    0
}
