//! Pages of mapped files that are not needed for a while.

use std::path::Path;

/// Give the resident pages of every read-only mapping of `path` in this process back to the system;
/// what is touched again is read again. llama.cpp and the graphs that are trained map the same file,
/// and pages count once for each. A system without `/proc` keeps them.
pub fn release_file(path: &Path) {
    #[cfg(target_os = "linux")]
    {
        let (Ok(path), Ok(maps)) = (
            path.canonicalize(),
            std::fs::read_to_string("/proc/self/maps"),
        ) else {
            return;
        };
        for line in maps.lines() {
            let Some((start, length)) = read_only(line, &path) else {
                continue;
            };
            // SAFETY: dropping pages loses what was written to them; the mapping is read-only and
            // of a file, so that the next access finds the same bytes. A mapping that has gone
            // meanwhile is refused.
            unsafe {
                libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = path;
}

/// Begin and length of the mapping in a line of `/proc/self/maps`, if it is one of `path` that
/// cannot be written to.
#[cfg(target_os = "linux")]
fn read_only(line: &str, path: &Path) -> Option<(usize, usize)> {
    let mut fields = line.splitn(6, ' ');
    let (range, access) = (fields.next()?, fields.next()?);
    let name = fields.nth(3)?.trim_start();
    if !access.starts_with("r-") || Path::new(name) != path {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |s| usize::from_str_radix(s, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    Some((start, end.checked_sub(start)?))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_read_only_mappings_of_the_file() {
        let path = Path::new("/a dir/model.gguf");
        let line =
            |access: &str, name: &str| format!("7f10-8f30 {access} 00000000 fe:00 42   {name}");
        let found = read_only(&line("r--s", "/a dir/model.gguf"), path);
        assert_eq!(found, Some((0x7f10, 0x1020)));
        assert_eq!(read_only(&line("rw-p", "/a dir/model.gguf"), path), None);
        assert_eq!(read_only(&line("r--s", "/a dir/model"), path), None);
        assert_eq!(read_only("7f10-8f30 r--p 00000000 00:00 0", path), None);
    }
}
