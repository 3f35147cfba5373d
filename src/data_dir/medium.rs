//! What `DATA_DIR` lies on: a disk, or memory that is gone with the machine and counts against its limit.

use std::path::{Path, PathBuf};

/// Whether the folder lies in memory, by the mount table.
pub fn is_in_memory(folder: &Path) -> bool {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    std::fs::read_to_string("/proc/self/mountinfo").is_ok_and(|mounts| is_memory_by(&mounts, &folder))
}

/// The kind of the mount that the folder lies on, see `proc_pid_mountinfo(5)`.
fn is_memory_by(mounts: &str, folder: &Path) -> bool {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        // The kernel writes a space in a path as \040.
        let point = PathBuf::from(before.split(' ').nth(4)?.replace("\\040", " "));
        let depth = folder.starts_with(&point).then(|| point.components().count())?;
        Some((depth, matches!(after.split(' ').next()?, "tmpfs" | "ramfs")))
    };
    // Of two on the same point the later one covers the earlier.
    let deepest = mounts.lines().filter_map(mount).max_by_key(|(depth, _)| *depth);
    deepest.is_some_and(|(_, is_memory)| is_memory)
}

/// How much memory this process may take, in bytes: its control group's limit, else what the machine has.
pub fn memory_limit() -> Option<u64> {
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    let groups = read("/proc/self/cgroup".into()).unwrap_or_default();
    let of_groups =
        group_limits(&groups).into_iter().filter_map(read).filter_map(|text| text.trim().parse().ok());
    let of_machine = read("/proc/meminfo".into()).and_then(|text| total_memory(&text));
    of_groups.chain(of_machine).min()
}

/// Where the limits of these groups, and of those around them, are written: version 2, then version 1.
fn group_limits(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // In a container its own group is the root.
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            files.push(Path::new(root).join(group).join(file));
        }
    }
    files
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_decides() {
        let mounts = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
                      30 22 0:26 / /tmp rw shared:9 - tmpfs tmpfs rw\n\
                      31 30 8:2 / /tmp/a\\040disk rw - ext4 /dev/sdb rw\n\
                      32 22 0:27 / /run rw - ramfs none rw\n";
        let is_memory = |path: &str| is_memory_by(mounts, Path::new(path));
        assert!(!is_memory("/data") && is_memory("/tmp/x/y") && is_memory("/run"));
        assert!(!is_memory("/tmp/a disk/z") && !is_memory("/running"));
        assert!(is_memory_by(&format!("{mounts}33 22 0:28 / / rw - tmpfs tmpfs rw\n"), Path::new("/data")));
    }

    #[test]
    fn the_limit_is_looked_for_in_every_group_around_the_process() {
        let paths = |text| -> Vec<String> {
            group_limits(text).iter().map(|path| path.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(
            paths("0::/a/b\n"),
            ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"]
        );
        let first = "5:cpu,cpuacct:/x\n4:memory:/x\n";
        assert_eq!(
            paths(first),
            ["/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert_eq!(total_memory("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        assert!(memory_limit().is_some_and(|bytes| bytes > 1 << 20));
    }
}
