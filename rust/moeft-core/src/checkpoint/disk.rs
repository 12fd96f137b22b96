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
